"""What is wrong upstream (Avalanche 0.6.0), as the notes that a table prints beside a row; tests show each."""

REPLAY = "From the second experience on a step sees twice the batch: that of the memory on top of the new one."
DER = f"{REPLAY} Replays nothing, without a word, while its memory is smaller than the batch."
DER_UNFIT = {
    "task": "Avalanche 0.6 computes the logits that it stores without the task labels that heads need (TypeError)."
}
ICARL = (
    "Avalanche 0.6 averages a class over its images and their mirror images, which for digits are no such class; "
    "classes not seen yet have the mean 0. With BatchNorm its teacher stays in train mode."
)
ICARL_UNFIT = {
    "task": "It has one classifier for all classes and no use for task labels.",
    "domain": "Its loss and its memory need each class in one experience only.",
}
GDUMB = "Draws its memory before the first step: from there on its batches are not those of the other rows."
EWC = (
    "Avalanche 0.6 squares gradients of mini-batch means, which is not the Fisher, and its penalty has no ½: its λ has "
    "a scale of its own."
)
SI = (
    "Its stored weights alias the live ones on a CPU (Avalanche 0.6), so its penalty is zero: equal to Naive, but for "
    "the momentum with which zero gradients let the heads of past tasks drift."
)
FIXED_SI = "Ours, from the paper (Zenke et al. 2017), because Avalanche's has no effect on a CPU."
MAS = (
    "Avalanche 0.6 computes its importance in train mode (which matters with dropout or BatchNorm), from gradients of "
    "mini-batch means, and averages over experiences with weight ½ where the paper adds. It raised at a loss of "
    "exactly zero; here it does not."
)
RWALK = (
    "Avalanche 0.6 trains the model in eval mode: no dropout, and BatchNorm never learns its statistics. It fails on "
    "new heads and is NaN after experiences of fewer than 10 steps; both are mended here."
)
LWF = "Avalanche 0.6 keeps the teacher in train mode: with dropout or BatchNorm its targets are noise in part."
