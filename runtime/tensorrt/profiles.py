"""Which optimization profile runs a call, and with how many rows."""

from __future__ import annotations

from dataclasses import dataclass

from mmm_export.engine_manifest import PlanInfo, ProfileInfo, ProfileName
from mmm_export.errors import EngineError


@dataclass(frozen=True)
class Profile:
    """One profile: its number in the plan, and how much of the dimension that varies it takes (tokens, or tiles)."""

    index: int
    least: int
    most: int

    def takes(self, count: int) -> bool:
        return self.least <= count <= self.most


@dataclass(frozen=True)
class DecoderProfiles:
    """Profiles of the decoder; `decode` is None when the plan has none and every call takes the prefill profile."""

    prefill: Profile
    decode: Profile | None

    def choose(self, tokens: int) -> tuple[Profile, int]:
        """Return the profile for so many tokens, and the tokens to run: more than given when the profile wants padding."""
        if tokens == 1 and self.decode is not None:
            return self.decode, 1
        return self.prefill, max(tokens, self.prefill.least)


def decoder_profiles(file: str, plan: PlanInfo, embeds: str) -> DecoderProfiles:
    """Read the decoder's profiles for one sequence.

    Args:
        file: name of the plan, for errors.
        plan: from the manifest.
        embeds: name of the input (batch, tokens, hidden).

    Raises:
        EngineError: no prefill profile, or one that does not take a batch of one sequence.
    """
    prefill = _find(file, plan, "prefill", embeds, axis=1)
    if prefill is None:
        raise _unusable(file, "no prefill profile", "a prefill profile for one sequence")
    decode = _find(file, plan, "decode", embeds, axis=1)
    if decode is not None and not decode.takes(1):
        raise _unusable(
            file, f"a decode profile of {decode.least} tokens and more", "a decode profile that takes 1 token"
        )
    return DecoderProfiles(prefill, decode)


def vision_profile(file: str, plan: PlanInfo, pixels: str) -> Profile:
    """Read the vision plan's profile; it ranges over tiles. Raises EngineError."""
    profile = _find(file, plan, "tiles", pixels, axis=0)
    if profile is None or profile.least > 1:
        raise _unusable(file, "no profile that takes one tile", "a tiles profile from 1 on")
    return profile


def _find(file: str, plan: PlanInfo, name: ProfileName, tensor: str, axis: int) -> Profile | None:
    for index, profile in enumerate(plan.profiles):
        if profile.name == name:
            _check_batch(file, profile, tensor, axis)
            sizes = profile.inputs[tensor]
            return Profile(index, sizes.least[axis], sizes.most[axis])
    return None


def _check_batch(file: str, profile: ProfileInfo, tensor: str, axis: int) -> None:
    if tensor not in profile.inputs or len(profile.inputs[tensor].least) <= axis:
        raise _unusable(file, f"no {tensor} in profile {profile.name}", f"a range for {tensor}")
    sizes = profile.inputs[tensor]
    if axis and not sizes.least[0] <= 1 <= sizes.most[0]:
        raise _unusable(
            file,
            f"profile {profile.name} for batches of {sizes.least[0]} to {sizes.most[0]}",
            "a profile that takes a batch of 1: a session runs one sequence",
        )


def _unusable(file: str, found: str, wanted: str) -> EngineError:
    return EngineError(
        f"{file} cannot run a session", found=found, wanted=wanted, hint="build the engine again: mmm-export trt"
    )
