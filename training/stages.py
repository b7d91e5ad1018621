"""What stages of training differ in: the form of a row of train.py's STAGES."""

from dataclasses import dataclass

from training.freeze import check_trained, is_llm_tuned

# what a finished run leaves in --out/final, and the file there that says it is finished
FINAL_FILES = {"projector": "projector.safetensors", "model": "config.json"}


@dataclass(frozen=True)
class Stage:
    """A row of STAGES: all that makes a stage what it is."""

    # in words, for --help
    goal: str
    # freeze.WORDS
    trained: tuple[str, ...]
    lr: float
    # samples of a step, and the most of them that one GPU holds at one time
    batch_size: int
    micro_batch_size: int
    data: str
    # the stage whose projector this one starts from; None: a fresh one
    projector_of: int | None
    out: str
    # what --out/final holds in the end, of FINAL_FILES; and in words, for its model card
    export: str
    result: str
    # the paper's table of how long such samples are, for a plan without data
    table: int

    @property
    def final_file(self) -> str:
        """The file in --out/final of a finished run."""
        return FINAL_FILES[self.export]

    @property
    def projector_file(self) -> str:
        """Where this stage leaves its projector, unless told another --out."""
        return f"{self.out}/final/{FINAL_FILES['projector']}"

    @property
    def is_llm_tuned(self) -> bool:
        """Whether weights of the language model itself are trained, all or some."""
        return is_llm_tuned(self.trained)


def check_stages(stages: dict[int, Stage]) -> None:
    """ValueError for a row that no run can follow, or whose result would be lost."""
    for number, stage in stages.items():
        check_trained(stage.trained)
        if stage.export not in FINAL_FILES:
            kinds = ", ".join(FINAL_FILES)
            raise ValueError(f"stage {number}: export={stage.export!r} is none of {kinds}")
        if stage.export == "projector" and stage.trained != ("mm_projector",):
            trained = ", ".join(stage.trained)
            raise ValueError(f"stage {number} trains {trained}, but exports the projector alone")
        if stage.projector_of not in (None, *stages):
            raise ValueError(
                f"stage {number} starts from stage {stage.projector_of}'s projector, "
                "which has no row"
            )
