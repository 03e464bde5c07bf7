import BackendKit
import HostSystem
import Synchronization

/// Where the device's thread and a worker meet: orders go one way, the queue comes back the other. Queues change hands
/// here and only here.
final class WorkerDesk: Sendable {
  enum Order: ~Copyable, Sendable {
    case none
    case serve(DeviceQueue)
    /// Finish what is in flight and give the queue back.
    case stop
    /// The same, and end the thread.
    case leave
  }

  private struct Drawer: ~Copyable, Sendable {
    var order = Order.none
    var delivered: DeviceQueue?
  }

  private let drawer = Mutex(Drawer())
  private let orders: EventFD
  private let deliveries: EventFD
  private let complaints = Mutex(RateLimit())

  init() throws(SystemError) {
    orders = try EventFD()
    deliveries = try EventFD()
  }

  // MARK: The device's side

  /// An order that was not taken yet is overtaken: a queue that its worker has not begun to serve comes straight back.
  func give(_ order: consuming sending Order) {
    var moved: Order? = consume order
    let cameBack = drawer.withLock { drawer -> Bool in
      guard let order = moved.take() else { return false }
      var overtaken = Order.none
      swap(&overtaken, &drawer.order)
      drawer.order = order
      guard case .serve(let queue) = consume overtaken else { return false }
      drawer.delivered = consume queue
      return true
    }
    if cameBack { deliveries.signal() }
    orders.signal()
  }

  /// How long a worker may take before it is looked whether a call holds it up.
  private static let patience = Duration.milliseconds(20)

  /// Waits for the queue that was ordered back, whose calls go to `ports`.
  func collect(_ ports: QueuePorts) throws(SystemError) -> DeviceQueue? {
    while true {
      if let queue = drawer.withLock({ $0.delivered.take() }) { return queue }
      if try !deliveries.fd.waitUntil(.readable, timeout: Self.patience) { ports.makeRoomForCalls() }
      deliveries.drain()
    }
  }

  // MARK: The worker's side

  /// Readable when there may be an order.
  var orderFD: CInt { orders.fd.rawValue }

  func takeOrder() -> Order {
    orders.drain()
    return drawer.withLock { drawer in
      var order = Order.none
      swap(&order, &drawer.order)
      return order
    }
  }

  func deliver(_ queue: consuming sending DeviceQueue) {
    var moved: DeviceQueue? = consume queue
    drawer.withLock { $0.delivered = moved.take() }
    deliveries.signal()
  }

  /// One log line about failing storage, seldom enough that a guest cannot fill the log.
  func complain(_ error: Errno, about name: String) {
    guard complaints.withLock({ $0.allows() }) else { return }
    Log.warning("A request to \(name) failed: \(error.explanation)")
  }
}
