"""The files that `comfyctl conjure install` puts into a CONJURE project. They are copied as they are."""
