"""Messages of a search show numbers that differ, and a remedy that works."""

from typing import Any

import pytest

from perceiver.config import PerceiverConfig
from perceiver.cost import parameter_count
from pipeline.settings.command_line import parse
from tune.config import SearchConfig
from tune.journal import Trial, no_best
from tune.space import DIMENSIONS, Space, gflops_per_image, told_apart

LARGE = PerceiverConfig(num_classes=1000, latent_dim=512, num_self_attention_heads=8, share_weights=False)
CLOSED: dict[str, Any] = {d.name: () for d in DIMENSIONS if d.name != "learning_rate"}


def test_numbers_that_differ_look_different() -> None:
    assert told_apart(8_309_863, 8_309_864) == ["8,309,863", "8,309,864"]
    assert told_apart(0.1, 0.25) == ["0.1", "0.25"]
    assert told_apart(0.123456781, 0.123456789) == ["0.12345678", "0.12345679"]
    assert told_apart(0.1, 0.1) == ["0.1", "0.1"]


def test_a_budget_just_below_a_model_is_told_from_its_cost() -> None:
    parameters, gflops = parameter_count(LARGE), gflops_per_image(LARGE)
    limit = f"search.max_parameters = {parameters - 1:,} is less than the {parameters:,} of a model"
    with pytest.raises(ValueError, match=limit):
        Space.of(SearchConfig(**CLOSED, max_parameters=parameters - 1), LARGE)
    limits: tuple[dict[str, Any], ...] = (
        {"max_gflops": gflops * (1 - 1e-9)},
        {"cost_limit_gflops": gflops * (1 - 1e-9), "objective": "accuracy_at_cost"},
    )
    for settings in limits:
        with pytest.raises(ValueError, match="is less than the") as raised:
            Space.of(SearchConfig(**CLOSED, **settings), LARGE)
        low, high = str(raised.value).split(" = ")[1].split(" of ")[0].split(" is less than the ")
        assert float(low) < float(high)
    said = no_best([Trial("trial-0001", {}, gflops, parameters)], SearchConfig(**limits[1]))
    low, high = said.split(" = ")[1].split(": ")[0].split(", and the cheapest of the 1 has ")
    assert float(low) < float(high)


def test_the_remedy_for_a_search_without_weight_decay_works() -> None:
    with pytest.raises(ValueError, match=r"search\.weight_decay = 0\.0: .* give --train\.weight-decay 0$"):
        SearchConfig(weight_decay=(0.0,))
    _, options = parse(["quickstart", "--train.weight-decay", "0"])
    assert options.config.train.weight_decay == 0
    space = options.config.search_space()
    assert space is not None
    assert "weight_decay" not in space.values
    for values in ((0.0,), (-1.0,)):
        with pytest.raises(ValueError, match="give a positive number, or none"):
            SearchConfig(learning_rate=values)
