// NetDevice: the virtio network card as a vhost-user back end. What it serves is a tap interface or a socket of packets;
// both speak the same language, a 12-byte virtio header before every frame.
//
// Transmit: `TransmitHeader` judges a copy of the driver's header (and, for segmentation offload, of the frame's own
// headers); the judged copy and the frame, straight from guest memory, leave in one writev. Receive: one readv straight
// into the driver's buffers, the header into a copy that is adjusted and put before the frame afterwards. `PacketPort` knows
// the kernel and no virtio; `TransmitHeader` knows virtio and no kernel; `NetworkCard` joins them to the queues.
