"""Loss terms and gradients of a whole step, on every layout, against transformers' models and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor
from torch._dynamo.utils import counters

from compactlm_nemo.config.distill import Recompute
from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import LiveTeacher, OwnMeshTeacher
from compactlm_nemo.models.build import ModelChunks, global_names, recompute_activations, tp_share
from compactlm_nemo.models.compile import compile_layers
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.experts import group_experts
from compactlm_nemo.models.forward import positions_of
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.parallel.collectives import all_gather
from compactlm_nemo.parallel.launch import second_mesh
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training import optimizer
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.support.meshes import COMBINED, EXPERT_LAYOUTS, LAYOUTS, VOCAB_MULTIPLE, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import EXPERT_CASES as PLAIN_EXPERT_CASES
from tests.support.tiny_models import VOCAB, document_bounds, save_tiny

CASES = ("llama", "llama_tied_llama3_rope", "nemotron")
EXPERT_CASES = (*PLAIN_EXPERT_CASES, "deepseek_v3")
STUDENT = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
TEMPERATURE = 2.0
LENGTH = 12


DOCUMENT_END = 7
"""Of the cases in DOCUMENT_CASES."""
DOCUMENT_CASES = ("mistral_window", "qwen2_tied", "gpt_oss_tied_layers")


def samples() -> Tensor:
    tokens = torch.randint(0, VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    for place in ((0, 3), (0, 4), (1, 0), (1, 9), (2, LENGTH), (3, 6), (3, 10)):
        tokens[place] = DOCUMENT_END
    return tokens


def logits_of(model: Any, tokens_BS: Tensor, document_end: int | None) -> Tensor:
    """`[B * S, V]`; with a token that ends documents, of every document by itself."""
    if document_end is None:
        return model(tokens_BS).logits.flatten(0, 1)
    rows = []
    for sample in tokens_BS:
        rows += [model(sample[None, a:b]).logits[0] for a, b in document_bounds(sample, document_end)]
    return torch.cat(rows)


def reference(student: Any, teacher: Any, document_end: int | None = None) -> dict[str, float]:
    """Means over the tokens of the definition; leaves the gradient of the first in the student."""
    tokens = samples()
    labels = tokens[:, 1:].flatten()
    s, t = (logits_of(model, tokens[:, :-1], document_end) for model in (student, teacher))
    t = t.detach()
    log_q, log_p = F.log_softmax(s / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
    kd = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    kd.backward()
    return {
        "train/loss": kd.item(),
        "train/kd_forward_kl": kd.item(),
        "train/lm_loss_nats": F.cross_entropy(s, labels).item(),
        "train/teacher_lm_loss_nats": F.cross_entropy(t, labels).item(),
        "train/tokens": labels.numel(),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case a teacher, a student, and the student's gradients written as if they were weights."""
    root = tmp_path_factory.mktemp("hf")
    for case in CASES + EXPERT_CASES + DOCUMENT_CASES:
        teacher = save_tiny(case, root / case / "teacher").double()
        student = save_tiny(case, root / case / "student", **STUDENT).double()
        end = DOCUMENT_END if case in DOCUMENT_CASES else None
        torch.save(reference(student, teacher, end), root / case / "terms.pt")
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.copy_(parameter.grad)
        student.float().save_pretrained(root / case / "gradients")
    return root


def gradients(ddps: list[Any]) -> dict[str, Tensor]:
    """Reduced gradients under global names; the shards of the ranks that hold the same parameters are put together."""
    for buffer in (buffer for ddp in ddps for buffer in ddp.buffers + ddp.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()]
            bucket.grad_data.copy_(all_gather(shard, group, dim=0))
    named = global_names(ddp.module for ddp in ddps)
    return {name: parameter.main_grad for name, parameter in named if parameter.requires_grad}


def separate(folder: Path, mesh: Mesh, layout: ParallelConfig) -> tuple[Dims, OwnMeshTeacher]:
    """A teacher on a mesh of its own, with its head as the student's mesh shards it."""
    teacher_mesh = second_mesh(layout, seed=1)
    with teacher_mesh.active():
        dims, chunks = filled(folder, teacher_mesh)
    _, source = open_hf(folder)
    name = "embedding.word_embeddings.weight" if dims.tied_embeddings else "output_layer.weight"
    padded = dims.padded_vocab(mesh.tp_size, VOCAB_MULTIPLE)
    head = tp_share(name, source(name), rank=mesh.tp_rank, size=mesh.tp_size, gated=False, padded_vocab=padded)
    return dims, OwnMeshTeacher(chunks, mesh, head.float() if mesh.is_last_stage else None)


def _step(
    root: Path,
    mesh: Mesh,
    student: str,
    micro_batch: int,
    own_layout: ParallelConfig | None = None,
    recompute: Recompute = Recompute.none,
    overlap: bool = False,
    prepare: Callable[[ModelChunks], None] | None = None,
) -> tuple[Any, Any, dict[str, float]]:
    _, learner = filled(root / student, mesh)
    recompute_activations(learner, recompute)
    ddps = wrap_data_parallel(learner.train(), overlap=overlap)
    if overlap and mesh.is_first_stage:  # the only one whose parameters Megatron divides
        assert len(ddps[0].bucket_groups) > 1
    live: LiveTeacher | OwnMeshTeacher
    if own_layout is None:
        dims, teacher = filled(root / "teacher", mesh)
        live = LiveTeacher(teacher)
    else:
        dims, live = separate(root / "teacher", mesh, own_layout)
    if root.name in DOCUMENT_CASES:
        for chunk in [*learner, *live.chunks]:
            chunk.document_end = DOCUMENT_END
    if prepare is not None:
        prepare(learner)
        prepare(live.chunks)
    batches = [Batch(part, ()) for part in samples()[mesh.dp_rank :: mesh.dp_size].split(micro_batch)]
    settings: dict[str, Any] = {"loss": LossConfig(), "temperature": TEMPERATURE}
    # Twice: the second must not see anything of the first.
    forward_backward(ddps, live, batches, **settings)
    terms = forward_backward(ddps, live, batches, **settings)
    return ddps, dims, terms


def _matches(
    rank: int,
    world: int,
    layout: dict[str, Any],
    cases: tuple[str, ...],
    root: Path,
    own_layout: ParallelConfig | None = None,
    recompute: Recompute = Recompute.none,
    overlap: bool = False,
    prepare: Callable[[ModelChunks], None] | None = None,
) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        micro_batch = 1 if case == "llama" or mesh.layout.virtual_stages > 1 else 2
        ddps, dims, terms = _step(root / case, mesh, "student", micro_batch, own_layout, recompute, overlap, prepare)
        assert terms == pytest.approx(torch.load(root / case / "terms.pt"), rel=1e-5), case
        _, wanted = open_hf(root / case / "gradients")
        padded = dims.padded_vocab(mesh.tp_size, VOCAB_MULTIPLE)
        compared = 0
        for name, got in gradients(ddps).items():
            stored = "embedding.word_embeddings.weight" if dims.tied_embeddings and "output_layer" in name else name
            want = tp_share(
                name, wanted(stored), rank=mesh.tp_rank, size=mesh.tp_size, gated=dims.gated_mlp, padded_vocab=padded
            )
            scale = max(float(want.abs().max()), 1e-6)
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=f"{case} {name}": f"{n}: {m}"
            )
            compared += 1
        assert compared == sum(p.requires_grad for ddp in ddps for p in ddp.module.parameters())

        if prepare is not None:
            continue
        ddps, _, terms = _step(root / case, mesh, "teacher", micro_batch, own_layout, overlap=overlap)
        assert abs(terms["train/loss"]) < 1e-6
        # On two layouts the same model sums in another order.
        same, least = (1e-9, 1e-6) if own_layout is None else (1e-6, 1e-5)
        assert terms["train/lm_loss_nats"] == pytest.approx(terms["train/teacher_lm_loss_nats"], abs=same)
        assert max(float(g.abs().max()) for g in gradients(ddps).values()) < least


@pytest.mark.parametrize("layout", COMBINED)
def test_step_is_the_definition_in_every_layout(layout, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, CASES, root)


TP_PP: dict[str, tuple[int, dict[str, Any]]] = {"tp2_sp_pp2": (4, {"tp": 2, "sequence_parallel": True, "pp": 2})}
"""With experts no training has tensor parallelism alone."""


@pytest.mark.parametrize("layout", ["1", "tp2_sp", "pp2", "vpp2", "cp2", *TP_PP, *EXPERT_LAYOUTS])
def test_step_with_experts_is_the_definition(layout, root, tmp_path):
    ranks, fields = (LAYOUTS | TP_PP | EXPERT_LAYOUTS)[layout]
    run_ranks(_matches, ranks, tmp_path, fields, EXPERT_CASES, root)


# Ranks, layout of the student, layout of the teacher.
TWO_LAYOUTS = {
    "tp1_of_tp2": (2, {}, ParallelConfig(tp=2)),
    "pp1_of_pp2": (2, {}, ParallelConfig(pp=2)),
    "tp2_sp_of_tp1": (2, {"tp": 2, "sequence_parallel": True}, ParallelConfig()),
    "vpp2_of_tp2_sp": (2, {"pp": 2, "virtual_stages": 2}, ParallelConfig(tp=2, sequence_parallel=True)),
    "tp2_of_pp2": (4, {"tp": 2}, ParallelConfig(pp=2)),
    "pp2_of_tp2_pp2": (4, {"pp": 2}, ParallelConfig(tp=2, pp=2)),
}


@pytest.mark.parametrize("layouts", TWO_LAYOUTS)
def test_step_with_a_teacher_of_another_layout_is_the_definition(layouts, root, tmp_path):
    ranks, student, teacher = TWO_LAYOUTS[layouts]
    run_ranks(_matches, ranks, tmp_path, student, CASES, root, teacher)


_small_buckets = partial(DistributedDataParallelConfig, bucket_size=1000)
"""Buckets of a few parameters, so that the first are summed while backward goes on."""


def _received_bytes(rank: int, world: int, student: dict[str, Any], teacher_layout: ParallelConfig, root: Path) -> None:
    """A rank receives the hidden states that it compares and did not compute, and no others."""
    mesh = mesh_of(**student)
    dims, live = separate(root / "teacher", mesh, teacher_layout)
    received: list[int] = []
    send_all, send_to_group, deliver = dist.batch_isend_irecv, dist.broadcast, live._delivered

    def counted(messages: list[Any]) -> Any:
        received.extend(message.tensor.nbytes for message in messages if message.op is dist.irecv)
        return send_all(messages)

    def counted_broadcast(tensor: Tensor, src: int, group: Any) -> None:
        received.extend([tensor.nbytes] * (src != rank))
        send_to_group(tensor, src=src, group=group)

    def delivered(*args: Any) -> list[Tensor]:  # without what the teacher's own pipeline sends
        dist.batch_isend_irecv, dist.broadcast = counted, counted_broadcast
        states = deliver(*args)
        dist.batch_isend_irecv, dist.broadcast = send_all, send_to_group
        return states

    live._delivered = delivered  # type: ignore[method-assign]
    batches = [Batch(part, ()) for part in samples()[mesh.dp_rank :: mesh.dp_size].split(1)]
    targets = live.targets(batches)
    state_bytes = LENGTH * dims.hidden_size * 4
    teacher = live.teacher_mesh
    per_teacher = len(samples()) // teacher.dp_size
    is_source = teacher.is_last_stage and teacher.tp_rank == 0
    computed = range(teacher.dp_rank * per_teacher, (teacher.dp_rank + 1) * per_teacher) if is_source else range(0)
    own = range(mesh.dp_rank * len(batches), (mesh.dp_rank + 1) * len(batches)) if mesh.is_last_stage else range(0)
    assert len(targets) == len(own)
    assert sum(received) == len(set(own) - set(computed)) * state_bytes
    # A broadcast to the world gives every rank all that it has not computed.
    totals = torch.tensor([sum(received), (len(samples()) - len(computed)) * state_bytes])
    dist.all_reduce(totals)
    now, by_broadcast = totals.tolist()
    assert now < by_broadcast if mesh.dp_size > 1 else now == by_broadcast


@pytest.mark.parametrize("layouts", ["tp2_sp_of_tp1", "pp1_of_pp2", "tp2_of_pp2", "pp2_of_tp2_pp2"])
def test_a_teacher_of_another_layout_sends_hidden_states_to_the_ranks_that_need_them_alone(layouts, root, tmp_path):
    ranks, student, teacher = TWO_LAYOUTS[layouts]
    run_ranks(_received_bytes, ranks, tmp_path, student, teacher, root / "llama")


def _overlapped(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    optimizer.DistributedDataParallelConfig = _small_buckets  # type: ignore[misc,assignment]
    _matches(rank, world, layout, cases, root, overlap=True)


@pytest.mark.parametrize("layout", ["dp2", "cp2", "vpp2", "tp2_pp2"])
def test_summing_gradients_during_backward_changes_nothing(layout, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_overlapped, ranks, tmp_path, fields, CASES, root)


@pytest.mark.parametrize("layout", ["ep2", "ep2_dp4"])
def test_summing_gradients_of_experts_during_backward_changes_nothing(layout, root, tmp_path):
    ranks, fields = EXPERT_LAYOUTS[layout]
    run_ranks(_overlapped, ranks, tmp_path, fields, EXPERT_CASES, root)


@pytest.mark.parametrize(
    ("layout", "recompute"), [("1", Recompute.none), ("vpp2", Recompute.full), ("tp2_sp_cp2", Recompute.selective)]
)
def test_documents_of_a_sample_do_not_see_each_other(layout, recompute, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, DOCUMENT_CASES, root, None, recompute)


def _kept_bytes(rank: int, world: int, root: Path, case: str) -> None:
    """What autograd keeps of a forward pass."""
    mesh, kept = mesh_of(), {}
    for recompute in Recompute:
        _, learner = filled(root / case / "student", mesh)
        recompute_activations(learner, recompute)
        sizes: list[int] = []
        inputs = samples()[:, :-1]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x):
            learner.train()[0](inputs, positions_of(inputs), None)
        kept[recompute] = sum(sizes)
    assert kept[Recompute.full] < kept[Recompute.none] / 4, kept
    assert kept[Recompute.full] < kept[Recompute.selective] < 0.75 * kept[Recompute.none], kept


@pytest.mark.parametrize("case", [CASES[0], "qwen2_moe"])
def test_recomputing_keeps_less(case, root, tmp_path):
    run_ranks(_kept_bytes, 1, tmp_path, root, case)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("layout", ["1", "tp2_sp", "vpp2", "tp2_pp2"])
def test_recomputing_activations_changes_nothing(layout, recompute, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, CASES[:1], root, None, recompute)


@pytest.mark.parametrize("layout", ["tp2_sp_pp2", "ep2"])
def test_recomputing_experts_changes_nothing(layout, root, tmp_path):
    ranks, fields = (TP_PP | EXPERT_LAYOUTS)[layout]
    run_ranks(_matches, ranks, tmp_path, fields, EXPERT_CASES, root, None, Recompute.selective)


def _compiled(
    rank: int,
    world: int,
    layout: dict[str, Any],
    cases: tuple[str, ...],
    root: Path,
    recompute: Recompute,
    overlap: bool,
    backend: str,
) -> None:
    if overlap:
        optimizer.DistributedDataParallelConfig = _small_buckets  # type: ignore[misc,assignment]
    _matches(rank, world, layout, cases, root, None, recompute, overlap, partial(compile_layers, backend=backend))
    assert counters["stats"]["unique_graphs"] > 0
    if world == 1:  # student and teacher, each a graph for all four layers, and one for the strides of the first
        is_apart = recompute is Recompute.selective  # the student's MLP, which a checkpoint calls
        assert counters["stats"]["unique_graphs"] == (7 if is_apart else 4), counters["stats"]
        assert bool(counters["graph_break"]) == is_apart
        assert all("rng_state" in why for why in counters["graph_break"]), counters["graph_break"]


# Inductor compiles C++ here, for a minute; `aot_eager` traces all that it does and compiles nothing.
@pytest.mark.parametrize(
    ("layout", "recompute", "overlap", "backend"),
    [
        pytest.param("1", Recompute.none, False, "inductor", marks=pytest.mark.slow),
        ("1", Recompute.none, False, "aot_eager"),
        ("1", Recompute.selective, False, "aot_eager"),
        ("dp2", Recompute.none, True, "aot_eager"),
        ("tp2_sp", Recompute.full, False, "aot_eager"),
        ("tp2_sp", Recompute.selective, False, "aot_eager"),
        ("cp2", Recompute.none, False, "aot_eager"),
    ],
)
def test_compiled_layers_change_nothing(layout, recompute, overlap, backend, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_compiled, ranks, tmp_path, fields, CASES[:1], root, recompute, overlap, backend)


def test_compiled_attention_of_layers_with_experts_changes_nothing(root, tmp_path):
    ranks, fields = EXPERT_LAYOUTS["ep2"]
    run_ranks(_compiled, ranks, tmp_path, fields, ("qwen2_moe", "gpt_oss"), root, Recompute.none, False, "aot_eager")


def _grouped(rank: int, world: int, layout: dict[str, Any], root: Path, recompute: Recompute) -> None:
    _matches(rank, world, layout, EXPERT_CASES, root, None, recompute, prepare=group_experts)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10 has no grouped product on the CPU")
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("1", Recompute.full), ("1", Recompute.selective), ("ep2", Recompute.none), ("tp2_sp_ep2", Recompute.none)],
)
def test_experts_in_one_product_are_the_definition(layout, recompute, root, tmp_path):
    ranks, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_grouped, ranks, tmp_path, fields, root, recompute)
