import ControlProtocol
import Glibc
import HostSystem

/// How the next back end of a device comes: a spare that waits already, or a new process, whose start and the fence go on at
/// the same time; then the core is told.
extension Supervisor {
  /// Does what is due. Failures concern one device and never the VM.
  func restartDue(_ now: MonotonicTime) {
    for care in cares.values {
      do throws(SupervisionError) {
        switch care.step {
        case .due(let time) where time <= now: try begin(care, now)
        case .succeeding: try goOn(care, now)
        case .none: if let time = care.spareDue, time <= now { startSpare(care, now) }
        default: break
        }
      } catch {
        giveUp(care, "\(error.message ?? "It failed"); the device \(care.id) needs a reset")
        // What was started must not stay: it has what the dead one had.
        processes.first { $0.id == care.id }?.signal(SIGKILL)
      }
    }
  }

  private func begin(_ care: DeviceCare, _ now: MonotonicTime) throws(SupervisionError) {
    var succession = DeviceCare.Succession(since: now, isReady: false, fence: nil)
    switch care.kind {
    case .external(let path):
      guard let socket = connectAgain(care.id, path) else {
        let time = now.since(care.lostTime ?? now)
        if let patience = care.policy.patience, time > .milliseconds(Int64(patience)) {
          return giveUp(
            care,
            "No back end of \(care.id) has come to '\(path)' for \(patience / 1000) s; the guest is told that the device needs a reset")
        }
        care.step = .due(now.advanced(by: time < DeviceCare.eagerTime ? DeviceCare.eagerInterval : DeviceCare.connectInterval))
        return
      }
      return try reattach(care, socket)
    case .jailed(let jailed):
      guard let dead = processes.firstIndex(where: { $0.id == care.id }) else { return }
      care.socket = try startJailed(jailed, null: -1, inPlaceOf: dead).ours
    case .program:
      guard let dead = processes.firstIndex(where: { $0.id == care.id }) else { return }
      if let spare = care.spare {
        move(spare, of: care, to: dead)
        succession.isReady = spare.isReady
      } else {
        let image = try startAgain(care, inPlaceOf: dead)
        care.unlockedImage = care.image?.isShared == true ? nil : image
      }
    }
    if care.unlockedImage != nil {
      succession.fence = (now, now.advanced(by: .milliseconds(configuration.deadlines.fence)))
    }
    care.step = .succeeding(succession)
    try goOn(care, now)
  }

  /// Starts a process of one of our programs; its core's end is left in `care.socket`.
  /// - Returns: its image, which is not locked.
  func startAgain(_ care: DeviceCare, inPlaceOf dead: Int? = nil, spareOf served: Int? = nil) throws(SupervisionError) -> FDBox? {
    guard case .program(let program, let arguments, let isOnTerminal) = care.kind else { return nil }
    var image: FDBox?
    if let known = care.image {
      image = try openAgain(care.id, known)
      if let ahead = care.imageAhead { (image, care.imageAhead) = (ahead, image) } else { openAhead(care) }
    }
    let pair = try Self.pair(.stream)
    let null = spawner == nil ? try HostFiles.null().release() : -1
    defer { if null >= 0 { close(null) } }
    let index = try startBackEnd(
      care.id, program, ["--fd=3"] + arguments, socket: pair.second.rawValue, image.map { [$0] } ?? care.resources, null: null,
      queueCount: reports[care.id]?.queues.count ?? 1, isOnTerminal: isOnTerminal, inPlaceOf: dead, spareOf: served)
    let socket = FDBox(pair.first)
    if served == nil { care.socket = socket } else { care.spare = DeviceCare.Spare(index: index, socket: socket, image: image) }
    return image
  }

  /// Hands over as soon as the new process is ready and the dead one's writes have ended.
  private func goOn(_ care: DeviceCare, _ now: MonotonicTime) throws(SupervisionError) {
    guard case .succeeding(var succession) = care.step else { return }
    if let image = care.unlockedImage, let known = care.image, let fence = succession.fence, fence.next <= now {
      if try HostFiles.claim(image.number, known.path, readOnly: known.readOnly, disk: care.id) {
        care.locked(image)
        care.unlockedImage = nil
        succession.fence = nil
      } else if now >= fence.until {
        processes.first { $0.id == care.id }?.signal(SIGKILL)
        return giveUp(care, "Writes of the dead process of \(care.id) do not end; nothing is done again, and the device needs a reset")
      } else {
        succession.fence = (now.advanced(by: DeviceCare.fenceInterval), fence.until)
      }
      care.step = .succeeding(succession)
    }
    if !succession.isReady, succession.since.advanced(by: .milliseconds(configuration.deadlines.ready)) <= now {
      say(.warning, "The new process of \(care.id) was not ready within \(configuration.deadlines.ready) ms and is killed")
      note(.startFailed, care.id, "not ready in time")
      care.dropSuccessor()
      care.step = .none
      processes.first { $0.id == care.id }?.signal(SIGKILL)
      return
    }
    guard succession.isReady, care.unlockedImage == nil, let socket = care.socket else { return }
    care.socket = nil
    try reattach(care, socket)
  }

  /// A process that is no device's first has said READY.
  func successorIsReady(_ index: Int) throws(SupervisionError) {
    let process = processes[index]
    if let care = care(ofSpare: process.id) {
      care.spare?.isReady = true
      return note(.spareReady, care.id, "", ["pid": UInt64(process.processID)])
    }
    guard let care = cares[process.id], case .succeeding(var succession) = care.step else { return }
    succession.isReady = true
    // What follows is done before the loop sleeps again.
    care.step = .succeeding(succession)
  }

  func reattach(_ care: DeviceCare, _ socket: FDBox) throws(SupervisionError) {
    care.step = .reattaching(sequence: try send(.reattach(id: care.id), [socket.number]))
    socket.close()
  }
}
