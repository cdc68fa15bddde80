"""The mathematics, in pure torch: modalities, paths, transformer, denoiser, objective, guidance, samplers."""
