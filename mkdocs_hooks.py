"""Serves benchmarks/results with the site, so that ../benchmarks/results/... works there as it does on GitHub."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent
SERVED = {".md", ".png", ".json", ".jsonl"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*")):
        if path.suffix not in SERVED:
            continue
        name = path.relative_to(ROOT).as_posix()
        file = File(
            f"../{name}",  # what a link from docs/ resolves to
            config.docs_dir,
            config.site_dir,
            config.use_directory_urls,
            dest_uri=name if path.suffix != ".md" else f"{name.removesuffix('.md')}/index.html",
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(file)
    return files
