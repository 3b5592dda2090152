"""``outlast VERB``: one file per verb or family of verbs."""

from outlast.cli.main import main as main
