"""A run directory to walk.html: one document followed through every stage, with its real values.

Each section names the code that did the work, as file and line found at run time. A later stage adds its sections to
SECTIONS, and a macro under each one's name to walk_sections.html.
"""

from collections.abc import Sequence

from nanochat import storage
from nanochat.errors import NanochatError
from nanochat.pages.page import source_of, write_page
from nanochat.pages.walk_artifacts import Section, Walk
from nanochat.pages.walk_chat import CHAT_SECTIONS
from nanochat.pages.walk_pretrain import PRETRAIN_SECTIONS

SECTIONS: tuple[Section, ...] = PRETRAIN_SECTIONS + CHAT_SECTIONS


def write_walk(run_dir: str, sections: Sequence[Section] = SECTIONS) -> str:
    """Write the run's walk.html, atomically, and return its path; `run_dir` may be a URI.

    A section whose artifacts are missing says so; one of a stage that not every run has is left out.
    """
    walk = Walk(run_dir)
    shown = []
    for section in sections:
        if section.needs is not None and not storage.exists(storage.join(walk.folder.root, section.needs)):
            continue
        try:
            values, missing = section.values(walk), None
        except NanochatError as err:
            values, missing = {}, str(err)
        code = [(source_of(piece), piece.__qualname__) for piece in section.code]
        shown.append({"name": section.name, "title": section.title, "code": code, "values": values, "missing": missing})
    return write_page(walk.folder.walk, "walk.html", {"title": storage.name_of(run_dir), "sections": shown})
