import torch

from train.measure import in_fresh_process
from train.proof.layer import LayerStudy, layer_memory, layer_seconds

CPU = torch.device("cpu")


def test_the_layer_study_sees_the_score_matrix_of_standard_alone() -> None:
    study = LayerStudy(batch=1, heads=2, head_dim=32)
    scores = 2 * 1024 * 1024 * 4
    standard = in_fresh_process(layer_memory, study, "standard", 1024, CPU, torch.float32)
    flash = in_fresh_process(layer_memory, study, "flash", 1024, CPU, torch.float32)
    assert standard > 2 * scores
    assert flash < scores


def test_layer_seconds_names_the_arms() -> None:
    study = LayerStudy(batch=1, heads=1, head_dim=8, rounds=1)
    arms = {"standard": "standard", "flash": "tiled"}
    seconds = layer_seconds(study, arms, 16, CPU, torch.float32)
    assert list(seconds) == ["standard", "flash"]
    assert all(0 < value < 10 for value in seconds.values())
