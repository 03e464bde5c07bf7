import ControlProtocol
import HostSystem

/// Processes that wait behind their walls, with everything they need, to take a device over: `spare=on`.
///
/// A spare is a process like the first one. Nobody speaks to it, so it does nothing; a disk's spare has the image open, but the
/// lock on it is the serving process's, and the spare serves nobody without it.
extension Supervisor {
  /// No device's id: it has a blank.
  static func spareName(_ id: String) -> String { id + " spare" }

  func care(ofSpare name: String) -> DeviceCare? {
    guard name.hasSuffix(" spare") else { return nil }
    return cares[String(name.dropLast(6))]
  }

  /// The VM runs: spares are started one by one, as the loop comes round.
  func startSpares(_ now: MonotonicTime) {
    for care in cares.values where care.policy.hasSpare { care.spareDue = now }
  }

  /// Nothing of the guest's depends on it: a failure is told, and tried again later.
  func startSpare(_ care: DeviceCare, _ now: MonotonicTime) {
    care.spareDue = nil
    guard care.spare == nil, let served = processes.firstIndex(where: { $0.id == care.id }) else { return }
    let name = Self.spareName(care.id)
    do throws(SupervisionError) {
      _ = try startAgain(care, inPlaceOf: processes.firstIndex { $0.id == name }, spareOf: served)
    } catch {
      say(.warning, "No spare for \(care.id): \(error.message ?? "it failed")")
      care.dropSpare(now)
    }
  }

  /// The spare takes the place of the device's process, and the other way round.
  func move(_ spare: DeviceCare.Spare, of care: DeviceCare, to place: Int) {
    care.socket = spare.socket
    care.unlockedImage = care.image?.isShared == true ? nil : spare.image
    if care.image?.isShared == true { spare.image?.close() }
    care.spareIsUsed()
    processes.swapAt(place, spare.index)
    processes[place].id = care.id
    processes[spare.index].id = Self.spareName(care.id)
    for index in [place, spare.index] {
      let process = processes[index]
      guard process.isAlive else { continue }
      for (number, token) in [
        (process.reportNumber, Token.launchReport(index)), (process.readyNumber, .ready(index)), (process.endNumber, .processEnd(index)),
      ] {
        guard let number else { continue }
        loop.remove(number: number)
        try? watch(number, token)
      }
    }
  }

  /// Where the VM ends: the end of its connection is a spare's order to exit.
  func dropSpares() {
    for care in cares.values {
      care.spareDue = nil
      care.spare?.socket.close()
      care.spare?.image?.close()
      care.spare = nil
      care.dropSuccessor()
    }
  }
}
