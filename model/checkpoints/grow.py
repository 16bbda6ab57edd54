"""Tables that grow when a checkpoint is loaded into a larger model, and what does not fit, in words."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from uniter.datasets.errors import BadInput
from uniter.model.checkpoints.read import TIED, State
from uniter.model.heads.downstream import TOKEN_TYPES, VCR_TOKEN_TYPES, WORDS
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.uniter import UniterConfig

log = logging.getLogger(__name__)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Copy tensors by name into a model, leniently: missing and unexpected names are logged, a wrong shape is an error.

    Args:
        model: any of our models; a tensor known under two names is found under either.
        state: tensors as `read_state` gives them.
        source: what to call the checkpoint in messages.

    Returns:
        The model's tensors that `state` does not hold, and which keep their values.

    Raises:
        BadInput: a tensor has another shape than the model's, or no name fits.
    """
    own = model.state_dict()
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        name = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise BadInput(
            f"checkpoint {source}: {name} has shape {tuple(state[name].shape)}, but this model expects {tuple(own[name].shape)}{others}; "
            "use the configuration that the checkpoint was made with"
        )
    missing = [name for name in own if name not in state and not (name in TIED and TIED[name] in state)]
    unexpected = [name for name in state if name not in own]
    if len(missing) == len(own):
        raise BadInput(f"checkpoint {source} holds none of this model's tensors; expected names such as {next(iter(own))!r}")
    if missing:
        log.warning("checkpoint %s lacks %d tensors, which keep their initial values: %s", source, len(missing), listed(missing))
    if unexpected:
        log.warning("checkpoint %s has %d tensors that this model does not use: %s", source, len(unexpected), listed(unexpected))
    model.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
    return missing


def listed(names: list[str], most: int = 6) -> str:
    """Names for a sentence, in order, the first `most` of them."""
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")


def with_grown_tables(state: Mapping[str, Tensor], model: nn.Module, *, token_type_rows: tuple[int, ...]) -> State:
    """A state dict whose embedding tables are as long as the model's.

    New token types are copies of the given rows; new word pieces keep the model's fresh values, and so does the bias of the
    word head at them. Tables that are long enough stay as they are.
    """
    grown, own = dict(state), model.state_dict()
    if TOKEN_TYPES in grown and len(grown[TOKEN_TYPES]) < len(own[TOKEN_TYPES]) == len(token_type_rows):
        if max(token_type_rows) >= len(grown[TOKEN_TYPES]):
            raise BadInput(f"the checkpoint knows {len(grown[TOKEN_TYPES])} token types, expected the two of a pre-trained UNITER or BERT")
        grown[TOKEN_TYPES] = grown[TOKEN_TYPES][list(token_type_rows)].clone()
    for name in (WORDS, "cls.predictions.decoder.weight", "cls.predictions.bias"):
        if name in grown and name in own and len(grown[name]) < len(own[name]):
            grown[name] = torch.cat([grown[name], own[name][len(grown[name]) :]])
    return grown


def second_stage(state: Mapping[str, Tensor], config: UniterConfig, *, extra_words: int, source: str) -> UniterForPretraining:
    """The model of VCR's second pre-training: more word pieces (the object tags), four token types.

    Differs from the published code: the word head keeps its pre-trained transform instead of beginning anew.

    Args:
        state: a pre-trained state dict of sizes `config`.
        extra_words: word pieces to add; their rows begin random.
        source: what to call the checkpoint in messages.
    """
    types = max(config.type_vocab_size, len(VCR_TOKEN_TYPES))
    model = UniterForPretraining(replace(config, vocab_size=config.vocab_size + extra_words, type_vocab_size=types))
    load_state(model, with_grown_tables(state, model, token_type_rows=VCR_TOKEN_TYPES), source=source)
    return model.eval()
