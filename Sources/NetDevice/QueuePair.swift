import BackendKit
import HostSystem

/// A receive and a transmit queue and the port they serve. A card with several queues has several of these, each with a
/// port of its own.
package final class QueuePair {
  package let port: PacketPort
  package let receive = ReceiveQueue()
  package let transmit = TransmitQueue()
  /// The driver has buffers, as far as is known: the port is worth reading.
  var wantsFrames = false
  /// The port took no more; the driver's frames wait for it.
  var isBlocked = false
  /// Enabled by the front end. A disabled receive queue gets nothing; of a disabled transmit queue everything is dropped.
  var receiveIsEnabled = false
  var transmitIsEnabled = false
  /// There is another side.
  package internal(set) var linkIsUp = true
  /// What the loop waits for on the port's behalf; nil while it is not registered.
  private var watched: Readiness?

  package init(port: PacketPort) { self.port = port }

  /// Tells the loop what to wait for now. A port nothing is wanted of is not registered: its end would be reported
  /// without end.
  func watch(_ context: inout BackendContext, token: Int) throws(SystemError) {
    var wanted: Readiness = wantsFrames ? .readable : []
    if isBlocked { wanted.insert(.writable) }
    let target: Readiness? = linkIsUp && !wanted.isEmpty ? wanted : nil
    guard target != watched else { return }
    switch (watched, target) {
    case (_, nil): context.unwatch(port.fd)
    case (nil, let readiness?): try context.watch(port.fd, for: readiness, token: token)
    case (_?, let readiness?): try context.rewatch(port.fd, for: readiness)
    }
    watched = target
  }
}
