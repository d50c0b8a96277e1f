"""The builders' file server, for data that come from them."""

from ..datasets_scripts.conftest import file_server

__all__ = ["file_server"]
