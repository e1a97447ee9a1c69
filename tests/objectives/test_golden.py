"""One training step of the reference, term by term and gradient by gradient."""

from __future__ import annotations

import pytest
import torch
from golden import Golden, load_golden

OUR_NAME = {"clip": "contrastive", "simsiam": "simsiam", "mlm": "masked_language", "nn_text": "nearest_neighbour"}


@pytest.fixture(params=["clip", "declip"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


def test_terms_and_gradients_equal_the_reference(golden: Golden) -> None:
    total, terms = golden.objective(golden.model(golden.batch), golden.batch)
    expected = golden.expected
    for theirs in expected["weights"]:
        assert terms[OUR_NAME[theirs]].item() == pytest.approx(expected["terms"][theirs], rel=1e-5), theirs
    assert total.item() == pytest.approx(expected["total"], rel=1e-5)

    total.backward()
    assert expected["grad_norms"].keys() == golden.parameters.keys()
    for name, norm in expected["grad_norms"].items():
        gradient = golden.parameters[name][0].grad
        if norm is None:
            assert gradient is None, name
            continue
        assert gradient is not None, name
        found = gradient.norm()
        if name == "encode_text.token_embedding.weight" and golden.model.mask_embedding is not None:
            found = torch.stack([found, golden.model.mask_embedding.grad.norm()]).norm()
        # Biases before a batch norm have a gradient of rounding noise.
        assert found.item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name


def test_queue_is_filled_like_the_reference() -> None:
    golden = load_golden("declip")
    golden.objective(golden.model(golden.batch), golden.batch)
    term = golden.objective.terms["nearest_neighbour"]
    torch.testing.assert_close(term.queue.T, golden.tensors["io.nn_bank_after"], rtol=1e-5, atol=1e-6)
    assert int(term.pointer) == int(golden.tensors["io.nn_bank_ptr_after"])


def test_embeddings_equal_the_reference(golden: Golden) -> None:
    from declip.model.towers import encode_text

    golden.objective(golden.model(golden.batch), golden.batch)
    golden.model.eval()
    for view, images in enumerate(golden.batch.images):
        found = golden.model.clip.visual(golden.model.pixels(images))
        torch.testing.assert_close(found, golden.tensors[f"io.image_embedding_{view}"], rtol=1e-4, atol=1e-5)
    from golden import OLD_TO_NEW

    tokens = OLD_TO_NEW[golden.tensors["io.text_tokens_eval"]]
    found, _ = encode_text(golden.model.clip, tokens[:, : int((tokens != 0).sum(1).max())])
    torch.testing.assert_close(found, golden.tensors["io.text_embedding"], rtol=1e-4, atol=1e-5)
