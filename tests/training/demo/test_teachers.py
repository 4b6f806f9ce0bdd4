"""The teacher of the demo's audio encoder."""

import torch

from chorus_moe.training.demo.teachers import TimeDelayTeacher


def test_a_teacher_does_not_hear_what_stands_behind_the_end_of_a_clip():
    torch.manual_seed(0)
    teacher, mask = TimeDelayTeacher(8, 3).eval(), (torch.arange(40) < 21)[None]
    clips = torch.randn(2, 40, 8)
    clips[1, :21] = clips[0, :21]
    first, second = teacher(clips, mask.expand(2, -1))["logits"]
    torch.testing.assert_close(first, second)


def test_a_teacher_learns_its_classes():
    torch.manual_seed(0)
    teacher, labels = TimeDelayTeacher(8, 3).train(), torch.arange(3).repeat(4)
    features = torch.randn(12, 20, 8) + 2 * torch.nn.functional.one_hot(labels, 8)[:, None]
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for _ in range(20):
        optimizer.zero_grad()
        teacher(features, torch.ones(12, 20), labels)["loss"].backward()
        optimizer.step()
    assert (teacher.eval()(features, torch.ones(12, 20))["logits"].argmax(dim=1) == labels).all()
