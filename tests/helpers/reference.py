"""Greedy text of transformers, and what counts as agreement with it."""

import copy

import torch


def greedy(reference, n: int, input_ids, **inputs) -> list[int]:
    """New tokens of transformers, without stop tokens and the repetition penalty of generation_config.json."""
    ids = reference.generate(
        input_ids=input_ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **inputs
    )
    return ids[0, input_ids.shape[1] :].tolist()


def in_bfloat16(reference: torch.nn.Module) -> torch.nn.Module:
    """A copy as from_pretrained(dtype=bfloat16) gives it: buffers (rotary frequencies) keep their precision."""
    reference = copy.deepcopy(reference)
    for p in reference.parameters():
        p.data = p.data.to(torch.bfloat16)
    return reference


# Of the largest logit. Tiny random models in bfloat16 are off by up to 0.045 of it from themselves in float32, in
# transformers and here alike (measured on the six text families); trained models by less.
NEAR_TIE = 0.05


def agree_up_to_near_tie(ours: list[int], reference, input_ids, **inputs) -> int:
    """The number of leading tokens on which ours and the reference's greedy text agree.

    Asserts that they differ, if they do, where the reference all but ties: there the token that ours chose has a logit
    next to the best one. Later tokens prove nothing, as the texts differ by then.
    """
    theirs = greedy(reference, len(ours), input_ids, **inputs)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
    if same < len(ours):
        ids = torch.cat((input_ids, torch.tensor([theirs[:same]], dtype=input_ids.dtype)), dim=1)
        if "mm_token_type_ids" in inputs:  # of Qwen2.5-VL: what is generated is text
            kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, same))
            inputs = inputs | {"mm_token_type_ids": kinds}
        logits = reference(input_ids=ids, **inputs).logits[0, -1].float()
        gap = float(logits[theirs[same]] - logits[ours[same]])
        assert gap <= NEAR_TIE * logits.abs().max(), (
            f"token {same}: {ours[same]}, not {theirs[same]}, which is better by {gap:.3f}"
        )
    return same
