"""What is run on the GPU: the phases, their jobs, what each needs installed, and how time is shared out among them.

Plain data without JAX or anything else that may be missing: ``measure`` reads it before it knows what is installed.
"""

from dataclasses import dataclass

PHASES = ("calibrate", "train", "mfu", "pipeline")
PREPARE = "prepare"  # a job, no phase: Numba compiles the planner and the simulator, once for all that plan

# Import names of what a phase needs beyond Python, and what pip calls it where that differs.
_ALWAYS = ("jax", "numpy", "scipy", "numba", "msgspec")
_PLANNING = ("pulp", "highspy", "optax")
NEEDS: dict[str, tuple[str, ...]] = {
    PREPARE: (*_ALWAYS, *_PLANNING),
    "calibrate": _ALWAYS,
    "train": (*_ALWAYS, *_PLANNING),
    "mfu": (*_ALWAYS, "optax"),
    "pipeline": (*_ALWAYS, *_PLANNING, "rich", "mpi4py"),
}
NEED_MPIEXEC = frozenset({"pipeline"})
NEED_MACHINE = frozenset({"train", "pipeline"})


@dataclass(frozen=True, slots=True)
class Case:
    """One model with the samples of an optimizer step; ``weight`` is its share of the time beside other jobs."""

    model: str
    batch: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """One subprocess: a phase, one model of a phase, or one way to run it (``variant``, of ``mfu``)."""

    phase: str
    case: Case | None
    weight: float
    variant: str = ""

    @property
    def name(self) -> str:
        return " ".join(word for word in (self.phase, self.case.model if self.case else "", self.variant) if word)


# Batches that leave an 80 GB device room without rematerialisation (float32 weights, AdamW; the zoo's attention
# keeps its scores), and are large enough to keep it busy.
CASES = (
    Case("gpt-125m:dtype=bf16", 16),
    Case("gpt-350m:dtype=bf16", 16, 1.5),
    Case("gpt-1.3b:dtype=bf16", 8, 2.0),
    Case("moe-380m:dtype=bf16", 8, 1.5),
    Case("wresnet-250m:dtype=bf16", 32, 1.5),
)
PIPELINE_CASE = Case("gpt-350m:dtype=bf16", 16, 3.0)

TINY_CASES = (
    Case("gpt:layers=2,hidden=64,heads=4,seq=64,vocab=256", 4),
    Case("moe:layers=2,hidden=32,heads=2,experts=4,seq=32,vocab=256,ffn=2,group=32", 4),
    Case("wresnet:layers=14,channels=8,width=2,image=32,classes=16,norm=microbatch", 4),
)
TINY_PIPELINE_CASE = Case("gpt:layers=2,hidden=64,heads=4,seq=64,vocab=256", 8)

PREPARE_WEIGHT = 2.0
CALIBRATE_WEIGHT = 4.0
MOST_CALIBRATE_SECONDS = 150.0
STRETCH = 3.0


def jobs_of(phases: tuple[str, ...], tiny: bool) -> tuple[Job, ...]:
    """The jobs of some phases, in the order in which they run.

    The machine file comes before what reads it, and first what the tables need most: plain JAX with XLA's attention,
    then the pipeline, then fused attention and the zoo's own loss.
    """
    cases = TINY_CASES if tiny else CASES
    pipeline_case = TINY_PIPELINE_CASE if tiny else PIPELINE_CASE
    fused = [case for case in cases if not (tiny or case.model.startswith("wresnet"))]
    plans = bool(NEED_MACHINE & set(phases))
    every = (
        Job(PREPARE, None, PREPARE_WEIGHT),
        Job("calibrate", None, CALIBRATE_WEIGHT),
        *(Job("train", case, case.weight) for case in cases),
        *(Job("mfu", case, case.weight, "xla") for case in cases),
        Job("pipeline", pipeline_case, pipeline_case.weight),
        *(Job("mfu", case, case.weight, "cudnn") for case in fused),
        *(Job("mfu", case, case.weight, "zoo") for case in cases),
    )
    return tuple(job for job in every if job.phase in phases or (job.phase == PREPARE and plans))


def limit_seconds(job: Job, later: tuple[Job, ...], left_seconds: float) -> float:
    """How long a job may take, of what is left for it and those after it.

    Calibration uses all that it gets, so it gets its fair share; others end early as a rule, and may take a few times
    theirs (``STRETCH``). The last job may use all that is left.
    """
    total = job.weight + sum(other.weight for other in later)
    if job.phase == "calibrate":
        return min(MOST_CALIBRATE_SECONDS, left_seconds * job.weight / total)
    return left_seconds * min(1.0, STRETCH * job.weight / total)
