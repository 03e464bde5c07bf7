import HostSystem
import VirtioQueue
import VirtioSpec

/// What became of a chain.
public enum ChainAnswer: Sendable {
  /// It is done with; the driver gets it back with as many bytes written as were put into it.
  case done
  /// It cannot be served now (there is no input, say): it stays in the ring, with all behind it, until
  /// `BackendContext.serveAgain` is called for its queue. Nothing of it may have been answered.
  case later
}

/// A device that answers one chain after another, in order: all that it says is what to do with a chain. The kit drains the
/// rings, decides about kicks and calls, counts, keeps a flood on one queue from starving the others, and does again what a
/// killed process left unanswered.
///
///     struct Upper: ChainDevice {
///       var profile: DeviceProfile { DeviceProfile(device: DeviceID(rawValue: 42)) }
///       mutating func serve(_ chain: inout DescriptorChain, queue: Int, _ context: inout BackendContext) -> ChainAnswer {
///         let request = chain.takeReadableBytes(atMost: 4096)
///         chain.put(request.map { (0x61...0x7A).contains($0) ? $0 - 0x20 : $0 })
///         return .done
///       }
///     }
///
///     exit(BackendProgram(name: "upper", type: "upper").run(OwnProgram.arguments, serving: { _ in Upper() }))
public protocol ChainDevice: VirtioDevice, ~Copyable {
  /// Reads the request out of the chain and puts the answer into it. Both parts may be shorter or longer than expected: the
  /// driver decides. Must not wait.
  mutating func serve(_ chain: inout DescriptorChain, queue: Int, _ context: inout BackendContext) -> ChainAnswer

  /// A chain that several processes were killed over. It goes back with what is put into it here: an error, in the device's
  /// own way of saying so. By default nothing.
  mutating func refuse(_ chain: inout DescriptorChain, queue: Int)
}

extension ChainDevice where Self: ~Copyable {
  public mutating func refuse(_ chain: inout DescriptorChain, queue: Int) {}
}

/// The kit's half of a `ChainDevice`.
struct ChainBackend<Device: ChainDevice & ~Copyable>: DeviceBackend, ~Copyable {
  private var device: Device
  private let slots: [Slot]

  /// Chains served before the other queues and the front end get their turn.
  private static var turn: Int { 256 }

  /// One queue while it runs. A class, because an array cannot own what cannot be copied.
  private final class Slot {
    var queue: DeviceQueue?
    var chain: DescriptorChain?
  }

  init(_ device: consuming Device) {
    slots = (0..<device.profile.queueCount).map { _ in Slot() }
    self.device = device
  }

  // The queues are the kit's: who waits for kicks is decided here.
  var profile: DeviceProfile {
    var profile = device.profile
    profile.kickWaiter = .loop
    profile.servesDisabledQueues = false
    return profile
  }
  var configuration: [UInt8] { device.configuration }
  var systemCalls: SystemCallNeeds { device.systemCalls }

  mutating func prepare(_ context: inout BackendContext) throws(BackendError) { try device.prepare(&context) }
  mutating func reset(_ context: inout BackendContext) { device.reset(&context) }
  mutating func lookAgain(_ context: inout BackendContext) { device.lookAgain(&context) }
  mutating func disconnected(_ context: inout BackendContext) { device.disconnected(&context) }
  mutating func negotiated(_ features: FeatureSet, _ context: inout BackendContext) { device.negotiated(features, &context) }
  mutating func writeConfiguration(_ bytes: [UInt8], at offset: Int, _ context: inout BackendContext) -> Bool {
    device.writeConfiguration(bytes, at: offset, &context)
  }
  mutating func ready(_ token: Int, _ readiness: Readiness, _ context: inout BackendContext) {
    device.ready(token, readiness, &context)
  }

  mutating func start(_ queue: consuming DeviceQueue, _ context: inout BackendContext) throws(BackendError) {
    let slot = slots[queue.index]
    slot.chain = DescriptorChain(for: queue.ring)
    slot.queue = consume queue
  }

  mutating func stop(queue index: Int, _ context: inout BackendContext) throws(BackendError) -> DeviceQueue? {
    slots[index].chain = nil
    return slots[index].queue.take()
  }

  mutating func kicked(queue index: Int, _ context: inout BackendContext) {
    let slot = slots[index]
    guard var queue = slot.queue.take() else { return }
    if var chain = slot.chain.take() {
      serve(&queue, &chain, &context)
      slot.chain = consume chain
    }
    slot.queue = consume queue
  }

  private mutating func serve(_ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ context: inout BackendContext) {
    var left = Self.turn
    repeat {
      queue.ring.disableKicks()
      var isEmpty = false
      while left > 0, !isEmpty {
        switch queue.ring.next(&chain) {
        case .empty: isEmpty = true
        case .broken(let why): return queue.markBroken(why)
        case .chain:
          guard answer(&queue, &chain, &context) else {
            if queue.ring.publish() { queue.call() }
            return
          }
          left -= 1
        }
      }
      if queue.ring.publish() { queue.call() }
      if !isEmpty { return context.serveAgain(queue: queue.index) }
    } while queue.ring.enableKicks()
  }

  /// False when the chain is to wait.
  private mutating func answer(
    _ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ context: inout BackendContext
  ) -> Bool {
    let (readable, room) = (chain.readableByteCount, chain.writableByteCount)
    if chain.isPoisoned {
      device.refuse(&chain, queue: queue.index)
      queue.counters.errors.add(1)
    } else if case .later = device.serve(&chain, queue: queue.index, &context) {
      queue.ring.giveBack(chain.token)
      return false
    }
    let written = room - chain.writableByteCount
    // A chain has less than 2^32 bytes.
    queue.ring.complete(chain.token, written: UInt32(clamping: written))
    queue.counters.requests.add(1)
    queue.counters.bytesRead.add(UInt64(readable - chain.readableByteCount))
    queue.counters.bytesWritten.add(UInt64(written))
    return true
  }
}
