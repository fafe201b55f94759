"""Teacher and student in one network: they share everything but the mixers, so a frozen weight is in memory once.

A layer holds the teacher's attention, the student's Mamba-2 mixer, or both. One pass runs it as the teacher, as the student,
or as the teacher with each student mixer imitating beside it (teacher forcing: every layer reads what the teacher made).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmm_export.distillation.batch import Batch
from mmm_export.distillation.losses import cross_entropy_sum, divergence_sum
from mmm_export.distillation.mixers import Frame, StudentMixer, TeacherMixer
from mmm_export.model.decoder import MmMamba
from mmm_export.model.layers import MLP
from mmm_export.model.linear import Projection, RMSNorm
from mmm_export.model.weights import model_skeleton
from mmm_export.spec import ModelSpec, StackSpec

Role = Literal["teacher", "student", "mimic"]
Objective = Literal["mimic", "divergence", "answers"]


class Layer(nn.Module):
    """One layer with one or both mixers.

    Args:
        spec: dimensions.
        eps: of the norms.
        teacher: whether it has attention.
        student: whether it has a Mamba-2 mixer.
    """

    def __init__(self, spec: ModelSpec, eps: float, *, teacher: bool, student: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden_size, eps)
        self.teacher = TeacherMixer(spec) if teacher else None
        self.student = StudentMixer(spec) if student else None
        self.out = Projection(spec.heads * spec.head_dim, spec.hidden_size)
        self.ffn_norm = RMSNorm(spec.hidden_size, eps)
        self.feed_forward = MLP(spec)

    def forward(
        self, x: Tensor, frame: Frame, role: Role, valid: Tensor | None = None, recompute: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Run one layer: x (B, T, hidden) -> x, and as "mimic" the squared error summed over valid tokens, mean over channels.

        A role that the layer has no mixer for is played by the other.
        """
        u = self.attention_norm(x)
        if role == "student" or self.teacher is None:
            y = (self.student or self.teacher)(u, frame)  # type: ignore[misc]
            return self._finish(x, y), None
        y = self.teacher(u, frame)
        if role != "mimic" or self.student is None:
            return self._finish(x, y), None
        # The teacher's side is constant here: no gradient leaves a layer.
        u, y = u.detach(), y.detach()
        if recompute and torch.is_grad_enabled():
            imitated = checkpoint(self.student, u, frame, use_reentrant=False, preserve_rng_state=False)
        else:
            imitated = self.student(u, frame)
        error = (imitated.to(_wide(y)) - y.to(_wide(y))).square().mean(-1)
        error = error if valid is None else torch.where(valid, error, 0)
        with torch.no_grad():
            x = self._finish(x, y)
        return x, error.sum()

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.out(y)
        mixed: Tensor = self.feed_forward(self.ffn_norm(x))
        return x + mixed


class Network(nn.Module):
    """All of the model, its layers as above.

    Args:
        spec: dimensions; a layer of kind "mha" has attention, one of kind "mamba2" a Mamba-2 mixer.
        students: attention layers, by global index, that get a Mamba-2 mixer beside it.
        dtype: type of the activations; weights keep their own type and are cast where used.
    """

    def __init__(self, spec: ModelSpec, *, students: frozenset[int] = frozenset(), dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.recompute = False  # activation checkpointing
        self.logit_tokens = 1024  # positions whose logits are in memory at a time
        frame = model_skeleton(spec, dtype=dtype)
        self.embedding_model = frame.embedding_model
        self.language_model = frame.language_model
        self.ropes = MmMamba.make_ropes(spec)
        self.embedding_model.encoder = _layers(spec, spec.embedding, 0, students)
        self.language_model.model.layers = _layers(spec, spec.llm, len(spec.embedding.kinds), students)

    @property
    def layers(self) -> list[Layer]:
        """All layers by global index."""
        both = [*self.embedding_model.encoder, *self.language_model.model.layers]
        return [layer for layer in both if isinstance(layer, Layer)]

    def forward(self, batch: Batch, objective: Objective, positions: Literal["all", "answers"] = "all") -> Tensor:
        """Sum the loss of a batch, not yet divided by anything: one number for each layer that imitates, or one in all.

        "mimic": squared error of each student mixer against its layer's attention. "divergence": KL of the student's token
        distribution from the teacher's. "answers": cross-entropy of the answers' tokens.
        """
        if objective == "mimic":
            with torch.no_grad():
                x = self.embed(batch)
            return self._run(x, batch, "mimic")[1]
        x = self.embed(batch)
        if objective == "answers":
            x, _ = self._run(x, batch, "student")
            return torch.stack([cross_entropy_sum(self.logits, x, batch.targets, self.logit_tokens)])
        with torch.no_grad():
            wanted, _ = self._run(x, batch, "teacher")
        x, _ = self._run(x, batch, "student")
        weights = batch.valid if positions == "all" else batch.targets >= 0
        return torch.stack([divergence_sum(self.logits, x, wanted, weights, self.logit_tokens)])

    def hidden(self, batch: Batch, role: Role = "student") -> Tensor:
        """Run both stacks: -> (B, T, hidden), before the final norm."""
        return self._run(self.embed(batch), batch, role)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Shapes: hidden (..., hidden) -> (..., vocab), in float32 or better."""
        scores: Tensor = self.language_model.output(self.language_model.model.norm(hidden))
        return scores.to(_wide(scores))

    def embed(self, batch: Batch) -> Tensor:
        """Embed text and images: -> (B, T, hidden)."""
        part = self.embedding_model
        text: Tensor = part.llm_text_embeddings(batch.ids).to(self.dtype)
        if batch.pixels.shape[0] == 0:
            return text
        features = MmMamba.image_features(self, batch.pixels)  # type: ignore[arg-type]
        is_image = batch.ids == self.spec.image_token_id
        row = (is_image.flatten().long().cumsum(0) - 1).clamp(min=0).view(batch.ids.shape)
        return torch.where(is_image[..., None], nn.functional.embedding(row, features), text)

    def _run(self, x: Tensor, batch: Batch, role: Role) -> tuple[Tensor, Tensor]:
        losses = []
        segments = batch.segments
        seen, ends = None, batch.valid.sum(1)
        if segments is not None:
            tokens = segments.shape[1]
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            same = segments[:, :, None] == segments[:, None, :]
            seen, ends = (causal & same)[:, None], same.sum(2)
        stacks = (("embedding", self.embedding_model.encoder), ("llm", self.language_model.model.layers))
        for name, layers in stacks:
            cos, sin = _angles(self.ropes[name], batch.positions, ends) if name in self.ropes else (None, None)
            frame = Frame(segments, seen, cos, sin)
            for layer in layers:
                if role == "mimic":
                    x, loss = layer(x, frame, role, batch.valid, self.recompute)
                    losses += [] if loss is None else [loss]
                elif self.recompute and torch.is_grad_enabled():
                    x, _ = checkpoint(layer, x, frame, role, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, _ = layer(x, frame, role)
            if name == "embedding" and self.spec.normalize_embedding:
                x = x / x.norm(dim=-1, keepdim=True)
        return x, torch.stack(losses) if losses else x.new_zeros(0)


def _layers(spec: ModelSpec, stack: StackSpec, first: int, students: frozenset[int]) -> nn.ModuleList:
    layers = nn.ModuleList()
    with torch.device("meta"):
        for i, kind in enumerate(stack.kinds, first):
            teacher = kind == "mha"
            layers.append(Layer(spec, stack.norm_eps, teacher=teacher, student=not teacher or i in students))
    return layers


def _angles(rope: nn.Module, positions: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, T, head_dim/2) for positions (B, T); `ends`, tokens of a sample, are (B,) or for each token (B, T)."""
    if ends.dim() == 1:
        cos, sin = rope(positions, ends)
        return cos, sin
    cos, sin = rope(positions.reshape(-1, 1), ends.reshape(-1))
    shape = (positions.shape[0], 1, positions.shape[1], -1)
    return cos.reshape(shape), sin.reshape(shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
