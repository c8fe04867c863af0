"""Where machines, intents, owners and the ledger are kept."""
