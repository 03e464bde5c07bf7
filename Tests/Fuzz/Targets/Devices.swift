import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

@testable import BackendKit

/// What a device needs of the kit, made once: the ports of a queue.
struct DeviceBench: @unchecked Sendable {
  let room = GuestRoom()
  private let ports: [QueuePorts]

  init() { ports = (0..<2).map { _ in sure { try QueuePorts(QueueCounters(), isServedByLoop: true) } } }

  /// A queue as the kit hands it over, over the driver's ring.
  func queue(_ index: Int, for driver: borrowing RingDriver) -> DeviceQueue {
    ports[index].forgetError()
    let ring = sure { try Virtqueue(driver.configuration, memory: room.memory) }
    return DeviceQueue(index: index, ring: ring, ports: ports[index], kickFD: -1)
  }
}
