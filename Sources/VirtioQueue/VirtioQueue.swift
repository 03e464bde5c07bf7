// # VirtioQueue
//
// Split and packed virtqueues (virtio 1.4, sections 2.7 and 2.8) over guest memory that its owner may change at any
// moment: the device side (`Virtqueue`, `DescriptorChain`), and the driver side (`DriverQueue`) for tests and for tools
// that drive back ends. What a chain means is left to devices, waiting and descriptors to event loops.
//
// A device is handed a `Virtqueue` and never asks which layout it has:
//
//     var chain = DescriptorChain(for: queue)                 // once; nothing allocates below
//     repeat {
//       queue.disableKicks()
//       drain: while true {
//         switch queue.next(&chain) {
//         case .empty: break drain
//         case .broken(let reason): return markBroken(reason)  // nothing more until reset
//         case .chain:
//           guard let header = chain.takeReadable(BlockRequestHeader.self) else { ... }
//           start(header, chain.token, chain.writable)         // iovecs, valid as long as the memory is
//         }
//       }
//     } while queue.enableKicks()                              // true: more came meanwhile
//
//     queue.complete(token, written: byteCount)                // any number of them, in any order
//     if queue.publish() { call.signal() }                     // once per batch
//
// Everything a guest writes is loaded once, checked, and used from the copy. A chain that breaks the rules of the ring
// breaks the ring, and that is a return value; nothing here traps on what a guest does.
