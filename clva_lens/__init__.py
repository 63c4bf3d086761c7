"""clva_lens: look inside vision-language models, and act on what you see."""
