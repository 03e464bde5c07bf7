// BlockDevice: the virtio block device. In rooms: `BlockRequest` reads a request off a descriptor chain and knows no I/O;
// `BlockConfigurationSpace` is what the driver sees of the disk; `BlockQueueWorker` serves one queue in one thread, between
// `VirtioQueue` and a `StorageEngine`, which knows no virtio; `BlockBackend` is the device towards `BackendKit`.
//
// One thread, one storage ring and one wait per queue, nothing shared: a worker takes everything available, hands it over in
// one system call that also reaps and sleeps, and answers in batches with one index store and at most one call.
