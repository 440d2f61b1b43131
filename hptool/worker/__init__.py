"""What runs in a job: one supervisor a node, and the ranks it forks. The only place that imports torch and megatron.

__main__       the command: train from a config, as a node's supervisor or as one rank of torchrun
supervisor     `run_node`: forks the node's ranks, watches them, ends them; imports torch and megatron late
pack           many runs in one job, one after the other, each in processes of its own
processes      forking a rank, its limits and its log; the heartbeat
nodes          which node of the job this is, what its ranks are called, and where they meet
refusals       what cannot run, said before anything is started
outcome        measurement.json, or the one failure that came first
rank           one rank from the process group to its outcome
orders         what a full training is asked to do, and the files of its directory
full_training  a node's part of it: ranks under their supervisor, progress, result
trainer        one rank of it, from the newest checkpoint to the end or a stop
checkpoints    its state on disk, by Megatron-core's distributed checkpointing
journal        what it writes down: every step, every evaluation, TensorBoard's scalars
evaluate       validation loss, scores of endings, samples of text, for every layout
hellaswag      questions with endings to choose from
text           tokenizers, and texts as tokens
serving        one rank of a run that serves: its points, one after the other
serving_command  the same by a command of the user's, without ranks
served         what such a run has done so far, on disk
generation     tokens from a model that is cut over ranks
cached_attention  its attention to keys and values that are kept
decoding_graphs  its passes for one token as CUDA graphs
weights        its weights, from a checkpoint
training       the loop and its clock
optimizer      data parallelism, Adam and the learning rate
model          a BaseConfig as Megatron's config and model
layers         the layers that models are built of, and bert and encoder_decoder the models of these families
kernels        what computes with what: Transformer Engine, what torch compiles, and its names
installed      what is installed beside torch and Megatron-core
attention      core attention and norm that need neither Transformer Engine nor Apex
cross_entropy  the loss over a vocabulary that is spread over ranks
initialise     weights that do not depend on the layout, for tests
data           synthetic or tokenised samples, the same for every layout
cpu            stand-ins that let Megatron-core run without CUDA
microbenchmarks  timed operations of a device, for `hptool calibrate`
collectives    timed exchanges between ranks, for the same
dry_run        the command, and `dry_run`: what a rank of a job of any size holds in memory, without a GPU
fake_rank      one rank's training on tensors without contents, and the ledger of their bytes
"""
