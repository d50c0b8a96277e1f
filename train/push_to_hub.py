"""Publishes on the Hub: a run's model, a corpus that a script of datasets_scripts/ has built, or a Space.

    python train/push_to_hub.py runs/geneformer-pbmc org/geneformer-pbmc --dry-run
    python train/push_to_hub.py runs/geneformer-pbmc org/geneformer-pbmc --private
    python train/push_to_hub.py data/lincs_l1000 org/lincs-l1000
    python train/push_to_hub.py spaces/geneformer org/geneformer

The folder says itself what it is. Needs a token that may write: `hf auth login`. What the Hub has already is not sent
again, so a command that was cut off can simply be repeated.
"""

import argparse

from cellglot.hub import HubError
from cellglot.publication import find_publication, publish


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="run, model directory, built corpus, or Space")
    parser.add_argument("repository", metavar="ORG/NAME", help="its name on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="a repository that only its organization sees")
    parser.add_argument("--dry-run", action="store_true", help="checks and lists what would be uploaded; sends nothing")
    options = parser.parse_args(argv)
    try:
        publication = find_publication(options.folder, options.repository)
        sizes = publication.sizes()
        print(f"{publication.kind} {options.repository}, {len(sizes)} files, {sum(sizes.values()):,} bytes:")
        print("\n".join(f"{size:>15,}  {name}" for name, size in sizes.items()))
        print(f"stays here: {', '.join(publication.left_out) or 'nothing'}")
        if "prepare.py" in sizes and not any(name.startswith("model/") for name in sizes):
            print("no model goes along: run prepare.py first, or set CELLGLOT_SPACE_MODEL in the Space's settings")
        if not options.dry_run:
            print(publish(publication, private=options.private))
    except HubError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
