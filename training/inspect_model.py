"""How large a model is: the parameter report of a config.json, a model folder or a Hub id."""

import os
from pathlib import Path

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.surgery import parameter_report
from chorus_moe.surgery.parameters import ParameterReport


def inspect_model(name_or_path: str | os.PathLike[str]) -> ParameterReport:
    """Count the parameters of a generative model without allocating them.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: a configuration of another kind of model.
    """
    source = str(name_or_path)
    path = Path(source)
    # A misspelt path must not be asked for on the Hub.
    if (path.suffix == ".json" or path.is_absolute() or source.startswith(".")) and not path.exists():
        raise FileNotFoundError(f"no configuration at {source!r}")
    values, _ = ChorusConfig.get_config_dict(source)
    if values.get("model_type") != ChorusConfig.model_type:
        raise ValueError(f"{source!r} is a {values.get('model_type')!r}, expected {ChorusConfig.model_type!r}")
    return parameter_report(ChorusConfig.from_dict(values))
