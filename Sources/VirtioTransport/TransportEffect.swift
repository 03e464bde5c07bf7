import VirtioSpec

/// One queue as the driver has set it up. Addresses are guest physical, aligned for the negotiated layout, and *not yet*
/// checked against the guest's memory, which this module does not know.
package struct QueueGeometry: Hashable, Sendable {
  package let index: Int
  /// 1 to the maximum offered; a power of two unless the ring is packed.
  package let size: UInt16
  /// Descriptor table, or packed descriptor ring.
  package let descriptors: UInt64
  /// Available ring, or driver event suppression.
  package let driver: UInt64
  /// Used ring, or device event suppression.
  package let device: UInt64
  /// MSI-X vector of its used-buffer notification; `nil` for none.
  package let vector: UInt16?

  package init(
    index: Int, size: UInt16, descriptors: UInt64, driver: UInt64, device: UInt64, vector: UInt16?
  ) {
    self.index = index
    self.size = size
    self.descriptors = descriptors
    self.driver = driver
    self.device = device
    self.vector = vector
  }
}

/// What a driver has agreed on by the time it sets DRIVER_OK. Nothing in it can change before the next reset, save the
/// vectors (`TransportEffect.queueVectorChanged`) and single queues by their own reset.
package struct Activation: Hashable, Sendable {
  /// Accepted features: always a subset of the offered ones, dependencies met.
  package let features: FeatureSet
  /// The enabled queues in rising order of index.
  package let queues: [QueueGeometry]

  package init(features: FeatureSet, queues: [QueueGeometry]) {
    self.features = features
    self.queues = queues
  }
}

/// The memory write by which a message-signalled interrupt is sent.
package struct InterruptMessage: Hashable, Sendable {
  package var address: UInt64
  package var data: UInt32

  package init(address: UInt64 = 0, data: UInt32 = 0) {
    self.address = address
    self.data = data
  }
}

/// What must happen outside after a register access, in order.
package enum TransportEffect: Hashable, Sendable {
  /// DRIVER_OK was set: hand the queues to the device.
  case activate(Activation)
  /// The driver asked for a reset of an active device: stop the queues, then call `resetCompleted()`.
  case reset
  /// The driver reset one queue (`FeatureSet.ringReset`): stop it, then call `queueResetCompleted(_:)`.
  case queueReset(Int)
  /// A queue that had been reset was set up and enabled again, while the device is active.
  case queueEnabled(QueueGeometry)
  /// A live queue's used-buffer notifications go to another vector from now on, or to none.
  case queueVectorChanged(queue: Int, vector: UInt16?)
  /// BAR 0 answers at another address; `nil` means nowhere, because memory decoding is off. Addresses may be absurd while
  /// a guest probes the size: what cannot be mapped is to be left unmapped.
  case barMoved(from: UInt64?, to: UInt64?)
  /// Vector `index` has another message or mask. While masked, its events must be kept pending (an eventfd keeps its
  /// count); on unmasking, a pending event is delivered.
  case vectorChanged(index: Int, message: InterruptMessage, isMasked: Bool)
  /// The driver wrote writable bytes of the device configuration; the shadow has them already.
  case configurationWritten(offset: Int, bytes: [UInt8])
  /// A notify write reached the register file rather than an ioeventfd: kick the queue.
  case notify(queue: Int)
  /// Send an event on a vector: signal its eventfd, masked or not.
  case signal(vector: Int)
}
