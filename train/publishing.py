"""Publishing at the end of a training run, for every method: the repository is made first, the model sent last."""

import sys
from dataclasses import dataclass
from typing import Any

from cellglot.hub import HubError, check_name, create_repository
from cellglot.publication import find_publication, publish

from .config import option


@dataclass
class PublishingOptions:
    """Whether and where a run publishes its model."""

    push_to_hub: str | None = option(None, "organization/name on the Hub to publish the finished model under")
    private: bool = option(False, "with push_to_hub: a repository that only its organization sees")

    def __post_init__(self) -> None:
        if self.push_to_hub is not None:
            check_name(self.push_to_hub)
        elif self.private:
            raise ValueError("private needs push_to_hub.")


def prepare_publication(config: PublishingOptions) -> None:
    """Makes the repository before hours of training: a wrong name or token, or no network, shows at once.

    Raises  HubError
    """
    if config.push_to_hub is not None:
        create_repository(config.push_to_hub, private=config.private)


def publish_run(config: Any, accelerator: Any) -> None:
    """Publishes the model of a finished run, on the main process, where the options ask for it.

    Raises  SystemExit if that fails; the run is complete all the same, and the message says how to repeat the upload
    """
    if config.push_to_hub is None or not accelerator.is_main_process:
        return
    try:
        publication = find_publication(config.output, config.push_to_hub)
        print(f"published: {publish(publication, private=config.private)}")
    except HubError as error:
        private = " --private" if config.private else ""
        sys.exit(f"{error} To repeat: python train/push_to_hub.py {config.output} {config.push_to_hub}{private}")
