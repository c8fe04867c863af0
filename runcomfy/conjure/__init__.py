"""Names that CONJURE imports from its own `runcomfy` folder, as thin adapters over the product."""
