// ConsoleDevice: where the bytes of a guest's console go, and where its input comes from. The same program serves a virtio
// console over vhost-user and, as serial carrier, the byte stream of the core's serial port.
//
// `ConsolePort` is the host side: a sink (terminal, pseudo-terminal, file, socket, nothing), two bounded buffers and the rule
// for readers that do not read. It knows descriptors and no virtio. `VirtioConsole` joins it to two virtqueues,
// `SerialCarrier` to a stream socket.
//
// The rule: while somebody reads, nothing is lost; a reader that is slow holds the guest up. A reader that has taken
// nothing for half a second, or is not there at all, holds nobody up: the newest 64 KiB of output are kept for when it
// comes back, what is older is dropped and counted.
