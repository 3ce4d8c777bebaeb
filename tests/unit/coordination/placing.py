"""Nodes and needs for tests of placement: plain ones by hand, odd ones by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from coordination.placement import GpuOffer, Need, Node, Offer, compile_need, with_defaults

MODELS = {"T4": ("7.5", 16_000), "A100": ("8.0", 40_000), "A100-80GB": ("8.0", 80_000), "H100": ("9.0", 80_000)}
WORDS = ("database", "web")


def gpu(uuid: str, model: str = "A100", **changes: Any) -> GpuOffer:
    """A GPU, all of it free."""
    capability, memory = MODELS[model]
    plain: dict[str, Any] = {"model": model, "memory_mb": memory, "memory_free_mb": memory}
    return GpuOffer(**{"uuid": uuid, "compute_capability": capability, **plain, **changes})


def node(name: str, *gpus: GpuOffer | str, cpus: float = 32, memory_mb: int = 256_000, **more: Any) -> Node:
    """A node, all of it free. A GPU may be given by its model alone."""
    offers = tuple(gpu(f"{name}-{n}", each) if isinstance(each, str) else each for n, each in enumerate(gpus))
    return Node.of(Offer(node=name, cpus=cpus, memory_mb=memory_mb, gpus=offers, **more))


def need(**requires: Any) -> Need:
    """Compiled from what an author writes; the hints of failed attempts may be among it."""
    return compile_need(with_defaults(requires))


shares = st.sampled_from([0.0, 0.19, 0.25, 0.5, 0.75, 0.81, 1.0]) | st.floats(0, 1)
labels = st.dictionaries(st.sampled_from(["zone", "rack"]), st.sampled_from(["a", "b"]))


@st.composite
def gpus(draw: st.DrawFn, uuid: str) -> tuple[GpuOffer, GpuOffer | None]:
    """A GPU as its node has it, and what is free of it now: None once it has fallen off the bus."""
    whole = gpu(uuid, draw(st.sampled_from(sorted(MODELS))))
    free = draw(st.sampled_from([0, 1_000, whole.memory_mb // 2, whole.memory_mb]))
    healthy = draw(st.sampled_from([True, True, True, False]))
    now = gpu(uuid, whole.model, share_free=draw(shares), memory_free_mb=free, healthy=healthy)
    return whole, draw(st.sampled_from([now, now, now, None]))


@st.composite
def nodes(draw: st.DrawFn, name: str = "n1") -> Node:
    """A node of which others hold a part. What is measured as free may be more than what it is said to have."""
    pairs = [draw(gpus(f"{name}-{n}")) for n in range(draw(st.integers(0, 4)))]
    amounts = [draw(st.sampled_from([(4, 0), (4, 3), (4, 4), (8, 2.5), (8, 8), (2, 4)])) for _ in range(3)]
    (cpus, cpus_free), (memory, memory_free), (disk, disk_free) = amounts
    tags = draw(labels)
    total = Offer(
        node=name,
        cpus=cpus,
        memory_mb=memory * 1_000,
        disk_mb=disk * 1_000,
        gpus=tuple(p[0] for p in pairs),
        labels=tags,
    )
    free = Offer(
        node=name,
        cpus=cpus_free,
        memory_mb=int(memory_free * 1_000),
        disk_mb=int(disk_free * 1_000),
        gpus=tuple(now for _, now in pairs if now is not None),
        labels=tags,
    )
    made = Node.of(free, total)
    made.tags = dict.fromkeys(draw(st.sets(st.sampled_from(WORDS), max_size=1)), 1)
    return made


@st.composite
def needs(draw: st.DrawFn, hints: bool = True) -> Need:
    """A need; any of its requirements may be left out."""
    asked = {
        "cpus": st.sampled_from([0.5, 1, 2.5, 4, 6]),
        "memory_mb": st.sampled_from([0, 2_500, 4_000, 6_000]),
        "disk_mb": st.sampled_from([0, 2_500, 4_000, 6_000]),
        "gpus": st.integers(0, 3),
        "gpu_share": st.sampled_from([0.19, 0.25, 0.5, 0.81, 1.0]),
        "gpu_memory_mb": st.sampled_from([0, 1_000, 8_000, 40_000, 80_000]),
        "gpu_model": st.sampled_from(["A100", "H100|T4", "^A100$"]),
        "min_compute_capability": st.sampled_from(["7.5", "8.0", "9.0", "10.0"]),
        "labels": labels,
        "not_labels": labels,
        "node": st.sampled_from(["n1", "n1", "n2"]),
        "anti_affinity": st.sampled_from(WORDS),
    }
    if hints:
        asked["avoid"] = st.sampled_from([["n1"], ["n2"]])
        asked["gpu_memory_above_mb"] = st.sampled_from([16_000, 40_000])
    often = {"cpus", "gpus", "gpu_share"}
    requires = {}
    for name, values in asked.items():
        if draw(st.integers(0, 1 if name in often else 5)) == 0:
            requires[name] = draw(values)
    if requires.get("gpus", 0) != 1:
        requires.pop("gpu_share", None)
    return need(**requires)
