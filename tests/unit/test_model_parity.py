"""On the same weights our Llama equals transformers', logits, loss and every gradient, to 1e-5."""

from functools import cache
from importlib import import_module

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from picotron_core.model.architecture import Architecture
from picotron_core.model.init import initialise
from picotron_core.model.llama import Llama
from picotron_core.ops import Ops
from picotron_core.ops.loss import IGNORE_INDEX

RELATIVE = 1e-5
LENGTH = 48
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # a third of LENGTH
}
SHAPES = {
    "gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mha-untied": {"num_key_value_heads": 8},
    "llama3-rope": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "head-dim": {"num_key_value_heads": 4, "head_dim": 12},
}
KERNELS = {  # what the model calls, by the op's name in Ops
    "attention": "naive_math.attention:attention",
    "norm": "naive_math.norm:rms_norm",
    "rope": "naive_math.rope:rope",
    "swiglu": "naive_math.swiglu:swiglu",
    "loss": "naive_math.loss:loss",
}
BACKENDS = {
    "naive_math": {},
    "sdpa": {"attention": "sdpa.attention:attention"},
    "mem_efficient": {"attention": "mem_efficient.attention:attention"},
    "mem_efficient-everywhere": {
        "attention": "mem_efficient.attention:attention",
        "swiglu": "mem_efficient.swiglu:swiglu",
        "loss": "mem_efficient.loss:loss",
    },
}


def kernel(path):
    module, name = path.split(":")
    return getattr(import_module(f"picotron_backends.{module}"), name)


def ops_of(**paths):
    kernels = {op: kernel(path) for op, path in (KERNELS | paths).items()}
    return Ops(**kernels, optimizer=None, comm=None)


@cache
def reference(shape):
    """transformers' model of that shape, its batch, logits and mean loss, with gradients."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=64,
        initializer_range=0.15,  # so that attention is far from uniform
        attn_implementation="eager",
        pad_token_id=None,
        **SHAPES[shape],
    )
    theirs = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:  # norms are born as one, which would hide a missing product
                parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(0, 97, (2, LENGTH))
    labels = ids.clone()
    labels[0, 10:20] = IGNORE_INDEX
    out = theirs(input_ids=ids, labels=labels, use_cache=False)
    out.loss.backward()
    return theirs, ids, labels, out.logits.detach(), out.loss.detach()


def assert_close(name, ours, theirs):
    """The whole tensor by its norm, and the worst entry by the largest."""
    ours, theirs = ours.double(), theirs.double()
    assert theirs.norm() > 0, f"{name}: nothing to compare with"
    error = ours - theirs
    assert error.norm() / theirs.norm() <= RELATIVE, name
    assert error.abs().max() / theirs.abs().max() <= RELATIVE, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_every_gradient_equal_transformers(shape, backend):
    theirs, ids, labels, logits, loss = reference(shape)
    ours = Llama(Architecture.from_transformers(theirs.config), ops_of(**BACKENDS[backend]))
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same too

    assert_close("logits", ours.logits(ours(ids)), logits)

    targets = torch.full_like(ids, IGNORE_INDEX)  # transformers shifts inside, we outside
    targets[:, :-1] = labels[:, 1:]
    valid = (targets != IGNORE_INDEX).sum()
    total = ours.loss(ids, targets)
    assert total.shape == ()
    assert total.dtype == torch.float32
    assert_close("loss", total / valid, loss)

    (total / valid).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == gradients.keys()
    for name, parameter in ours.named_parameters():
        assert_close(name, parameter.grad, gradients[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_document_is_read_as_if_it_stood_alone(backend):
    """doc_ids reach every layer: two documents in one row equal the two on their own."""
    theirs, ids, *_ = reference("gqa-tied")
    ours = Llama(Architecture.from_transformers(theirs.config), ops_of(**BACKENDS[backend]))
    ours.load_state_dict(theirs.state_dict())
    doc_ids = torch.tensor([[7] * 20 + [3] * (LENGTH - 20)]).expand(2, -1)
    packed = ours(ids, doc_ids=doc_ids)
    # Rope is relative, so the second document may start at position 0 as well as at 20.
    alone = torch.cat([ours(ids[:, :20]), ours(ids[:, 20:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=3e-5)
    assert (packed - ours(ids))[:, 20:].abs().max() > 0.1


def test_our_initial_weights_load_into_transformers_under_the_same_names():
    theirs, ids, *_ = reference("gqa-tied")
    ours = Llama(Architecture.from_transformers(theirs.config), ops_of())
    initialise(ours, seed=3)
    other = LlamaForCausalLM(theirs.config).float()
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert_close("logits", ours.logits(ours(ids)), other(input_ids=ids).logits)
