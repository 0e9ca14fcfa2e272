"""normscope: exact gradient norms, token-gradient statistics and spectra of a PyTorch model while it trains."""
