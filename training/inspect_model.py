"""How large a model is: the reports of a config.json, a model folder or a Hub id."""

import os

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.surgery import parameter_report
from chorus_moe.surgery.parameters import ParameterReport
from chorus_moe.training.loading import check_source
from chorus_moe.training.sizes import SizeReport, size_report


def inspect_model(name_or_path: str | os.PathLike[str]) -> tuple[ParameterReport, SizeReport]:
    """Count the parameters of a generative model, and the bytes that it takes, without allocating them.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: a configuration of another kind of model.
    """
    config = read_config(name_or_path)
    return parameter_report(config), size_report(config)


def read_config(name_or_path: str | os.PathLike[str]) -> ChorusConfig:
    """The configuration at a path or Hub id; errors as in `inspect_model`."""
    source = str(name_or_path)
    check_source(source)
    values, _ = ChorusConfig.get_config_dict(source)
    if values.get("model_type") != ChorusConfig.model_type:
        raise ValueError(f"{source!r} is a {values.get('model_type')!r}, expected {ChorusConfig.model_type!r}")
    return ChorusConfig.from_dict(values)
