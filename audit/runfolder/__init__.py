"""The run folder: what a run leaves behind, and how it knows what is already done. docs/storage.md describes it."""

from __future__ import annotations

from audit.runfolder.difference import difference
from audit.runfolder.errors import RunFolderError
from audit.runfolder.folder import SCHEMAS, RunFolder, TableName
from audit.runfolder.manifests import Manifest

__all__ = ["SCHEMAS", "Manifest", "RunFolder", "RunFolderError", "TableName", "difference"]
