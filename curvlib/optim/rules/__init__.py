"""Update rules: pure functions on tensors, which know no network and no optimizer."""
