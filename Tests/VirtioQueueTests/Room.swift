// Tests of VirtioQueue.
