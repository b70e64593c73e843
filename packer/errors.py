"""What goes wrong with data: what is skipped and counted, what is only noted, and when to stop."""

CAUSES = {
    "decode_error": "no image, or one that is damaged",
    "too_many_pixels": "above max_pixels, never decoded",
    "size_mismatch": "not of the size that was planned",
    "aspect_ratio": "beyond max_aspect_ratio",
    "missing_image": "no image in the sample",
    "missing_caption": "no caption, or an empty one",
    "missing_label": "no label",
    "bad_label": "the .cls is no 64-bit integer",
    "duplicate_key": "a key that had come before",
    "truncated_shard": "shard ends inside a sample",
    "corrupt_shard": "no tar header where one must be",
    "missing_shard": "shard cannot be opened or read",
    "unterminated_shard": "shard ends without its end mark",
    "caption_replaced": "caption not UTF-8, bytes replaced",
}
"""Every cause that is counted, in the order of the table at the end of a run: what it means."""

NOTED_CAUSES = frozenset({"caption_replaced", "unterminated_shard"})
"""Causes that lose no sample: it is used, and the defect is counted as noted, not as skipped."""


class SkipSample(Exception):
    """One sample cannot be used; it is skipped with its caption and counted by cause.

    Only defects of the data are reported this way. A wrong setting or an image of a kind that is
    never accepted is a `ValueError`, and a mistake of ours stays what it is.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        # Both go to Exception's arguments, so that the error survives pickling between processes.
        super().__init__(cause, detail)
        self.cause = cause
        """Short name that is counted, for example ``"decode_error"``."""
        self.detail = detail
        """What was found, for the log."""

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


class TooManyFailures(RuntimeError):
    """So many samples in a row had to be skipped that the run must not go on."""
