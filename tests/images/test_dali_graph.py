"""DALI's graph for a card, without one: what runs there, and what waits for what the host sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dask_imgcurator.images.dali import Pipeline
from dask_imgcurator.images.preprocess import Preprocess

dali = pytest.importorskip("nvidia.dali.pipeline")


@pytest.fixture(params=[True, False], ids=["views", "no views"])
def graph(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The graph as DALI has it before it looks for a card."""
    monkeypatch.setattr(dali.Pipeline, "build", lambda self: self._build_graph())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    preprocess = Preprocess((224, 160), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    return Pipeline(preprocess, 8, "mixed", 2, False, request.param)._build()


def test_pixels_stay_on_the_card_and_numbers_on_the_host(graph: Any) -> None:
    """An argument on the card would have to be copied back, which waits for the card, once a batch."""
    fed = {"encoded", "between", "size", "anchor"}
    for node in graph._ops:
        device = getattr(node._op, "device", "cpu")
        if node.name in fed:
            assert (device, list(node.inputs)) == ("cpu", [])
            continue
        assert device == ("mixed" if [i.name for i in node.inputs] == ["encoded"] else "gpu"), node.name
        assert [o.device for o in node.outputs] == ["gpu"]
        data, *arguments = node.inputs
        assert data.device == ("cpu" if device == "mixed" else "gpu")
        assert {i.name for i in arguments} <= fed - {"encoded"}, f"{node.name}: a constant, perhaps on the card"
        assert {i.device for i in arguments} <= {"cpu"}
    assert {o.device for o in graph._graph_outputs} == {"gpu"}


def test_what_each_operator_is_told(graph: Any) -> None:
    def named(kind: str) -> list[Any]:
        return [node for node in graph._ops if kind in node.name]

    (decoder,), (cut,) = named("Image"), named("Slice")
    assert decoder._op._init_args["jpeg_fancy_upsampling"] is True
    assert decoder._op._init_args["adjust_orientation"] is False
    assert [i.name for i in cut.inputs][1:] == ["anchor"]
    assert cut._op._init_args["shape"] == [224, 160]
    resized = [[i.name for i in node.inputs][1:] for node in named("Resize")]
    assert resized[:2] == [["between"], ["size"]]  # one side after the other
    assert all(node._op._init_args["antialias"] for node in named("Resize"))
    assert len(graph._graph_outputs) == (3 if len(resized) > 2 else 1)
