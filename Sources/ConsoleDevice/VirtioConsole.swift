import BackendKit
import Glibc
import HostSystem
import VirtioSpec

/// A virtio console with one port behind vhost-user. One thread, the kit's.
package final class VirtioConsole: DeviceBackend {
  private enum Token {
    static let again = 0
    static let windowChange = 1
  }

  private let port: ConsolePort
  private let control: ControlLine?
  private let input = InputQueue()
  private let output = OutputQueue()
  /// Signalled by ourselves when a turn ended with work left.
  private let again: EventFD
  /// SIGWINCH, from the terminal or from the supervisor.
  private let windowChanges: OwnedFD?
  private var windowSize: WindowSize?
  /// The driver has been made to look at the size since its queues run.
  private var sizeIsTold = false

  /// - Parameter control: where the escape key is reported; without it the program ends.
  package static func make(port: ConsolePort, control: consuming ControlLine?) throws(SystemError) -> VirtioConsole {
    let again = try EventFD()
    let changes = port.isTerminal ? try Signals.descriptor(for: [SIGWINCH]) : nil
    return VirtioConsole(port, control, again, changes)
  }

  private init(_ port: ConsolePort, _ control: consuming ControlLine?, _ again: consuming EventFD, _ changes: consuming OwnedFD?) {
    self.port = port
    self.control = control
    self.again = again
    windowChanges = changes
    windowSize = port.windowSize
  }

  package var profile: DeviceProfile {
    var features: FeatureSet = [.version1, .indirectDescriptors, .eventIndex, .packedRing, .consoleEmergencyWrite]
    if port.isTerminal { features.insert(.consoleSize) }
    return DeviceProfile(device: .console, queueCount: 2, features: features)
  }

  package var systemCalls: SystemCallNeeds { SystemCallNeeds([.console]) }

  package var configuration: [UInt8] {
    var space = ConsoleConfiguration()
    space.columns = windowSize?.columns ?? 0
    space.rows = windowSize?.rows ?? 0
    space.maxPortCount = 1
    return space.encoded()
  }

  /// The emergency register: a byte of output for guests that have no queues yet, or no more.
  package func writeConfiguration(_ bytes: [UInt8], at offset: Int, _ context: inout BackendContext) -> Bool {
    guard offset == ConsoleConfiguration.Offset.emergencyWrite, (1...4).contains(bytes.count) else { return false }
    unsafe bytes.withUnsafeBytes { all in unsafe port.writeOrDrop(UnsafeRawBufferPointer(rebasing: all[..<1])) }
    watch(&context)
    return true
  }

  package func prepare(_ context: inout BackendContext) throws(BackendError) {
    do throws(SystemError) {
      try context.watch(again.fd, for: .readable, token: Token.again)
      switch windowChanges {
      case .some(let fd): try context.watch(fd, for: .readable, token: Token.windowChange)
      case .none: break
      }
    } catch { throw .system(error) }
    watch(&context)
  }

  package func start(_ queue: consuming DeviceQueue, _ context: inout BackendContext) throws(BackendError) {
    if queue.index == ConsoleSpec.receiveQueue {
      input.start(queue)
    } else {
      sizeIsTold = false
      output.start(queue)
    }
  }

  package func stop(queue index: Int, _ context: inout BackendContext) throws(BackendError) -> DeviceQueue? {
    if index == ConsoleSpec.receiveQueue { return input.stop() }
    let queue = output.stop(port)
    watch(&context)
    return queue
  }

  package func kicked(queue index: Int, _ context: inout BackendContext) {
    if index == ConsoleSpec.receiveQueue {
      input.fill(from: port)
    } else {
      drain()
      tellSize(&context)
    }
    watch(&context)
  }

  /// Linux looks at the size when it hears of a change, and never at the start. It may only hear of one once its console
  /// exists: before that, between DRIVER_OK and the making of the port, its driver stops at a BUG. The first output shows
  /// that it does.
  private func tellSize(_ context: inout BackendContext) {
    guard !sizeIsTold, output.hasServed, windowSize != nil else { return }
    sizeIsTold = true
    context.configurationChanged()
  }

  package func ready(_ token: Int, _ readiness: Readiness, _ context: inout BackendContext) {
    switch token {
    case Token.again:
      again.drainAfterReport()
      drain()
      input.fill(from: port)
    case Token.windowChange: windowChanged(&context)
    default: act(on: port.ready(token, readiness))
    }
    watch(&context)
  }

  private func act(on outcome: ConsolePort.Outcome) {
    if outcome.contains(.quit), !(control?.report(.quit) ?? false) {
      // Nobody else can end the VM: this process goes, as if it had been told to.
      _ = kill(getpid(), SIGTERM)
    }
    if outcome.contains(.input) { input.fill(from: port) }
    if outcome.contains(.room) { drain() }
  }

  private func drain() {
    if output.drain(to: port) == .turnOver { again.signal() }
  }

  private func windowChanged(_ context: inout BackendContext) {
    // Bounded: a signal that waits is there once.
    windowChanges.with({ fd in while Signals.next(from: fd) != nil {} }, else: ())
    let size = port.windowSize
    guard size != windowSize else { return }
    windowSize = size
    context.configurationChanged()
  }

  private func watch(_ context: inout BackendContext) {
    port.watch(with: &context)
    if port.readUnwatchableInput().contains(.input) { again.signal() }
  }
}
