"""Settings that ship: `uniter-train pretrain --config NAME`."""
