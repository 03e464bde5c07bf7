import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// Death of a back end under a running guest (protocol/recovery.md).
extension Supervisor {
  func care(for device: DevicePlan, isOpenedHere: Bool = true) throws(SupervisionError) -> DeviceCare {
    let id = device.assignment.id
    let policy = configuration.deathPolicy(of: id)
    switch device.backEnd {
    case .external: return DeviceCare(id, .external(path: configuration.externalSocket(of: id) ?? ""), policy, image: nil)
    case .jailed(let jailed):
      if isOpenedHere { try findStorage(ofJailed: id) }
      return DeviceCare(id, .jailed(jailed), policy, image: nil)
    case .program(let program, let arguments, let resources, let isOnTerminal):
      var image: DeviceCare.Image?
      for disk in configuration.disks where disk.id == id {
        if case .image(let path, let readOnly) = disk.source, let resource = resources.first {
          let status = isOpenedHere ? try HostFiles.status(resource.number) : nil
          image = DeviceCare.Image(
            path: path, readOnly: readOnly, isShared: disk.isShared, status: status,
            isSynchronous: isOpenedHere && HostFiles.isSynchronous(resource.number))
          if let status { try findStorage(id, path, status) }
        }
      }
      return DeviceCare(id, .program(program, arguments: arguments, isOnTerminal: isOnTerminal), policy, image: image)
    }
  }

  /// A device process has ended. False: nothing is done about it, and the caller tells.
  func backEndDied(_ process: VMProcess, _ end: ProcessEnd) -> Bool {
    if let care = care(ofSpare: process.id) {
      // One that a replacement has sent away: the next is of the new kind.
      guard care.spare != nil else {
        care.spareDue = care.spareDue ?? .now
        return true
      }
      say(.warning, "The spare \(process.program) of \(care.id) (pid \(process.processID)) \(end)")
      care.dropSpare(.now)
      return true
    }
    guard let care = cares[process.id] else { return false }
    care.giveUpLock()
    if case .givenUp = care.step { return true }
    let what = "\(process.program) of \(process.id) (pid \(process.processID)) \(end)"
    noteLoss(care, what, ["pid": UInt64(process.processID)])
    care.dropSuccessor()
    switch care.policy.action {
    case .fail: return false
    case .stopVM:
      say(.error, "\(what); the VM ends, as on-death=stop-vm says")
      self.end(.device, askCore: true)
    case .hold:
      care.step = .held
      note(.held, care.id)
      say(.warning, "\(what); the device is held")
    case .restart:
      guard let delay = care.delay(afterDeathAt: .now) else {
        giveUp(care, "\(what), too often; the guest is told that the device needs a reset")
        return true
      }
      care.step = .due(.now.advanced(by: delay))
      say(.warning, "\(what); it is started again")
    }
    return true
  }

  /// The core has lost a back end. One of ours that lives is of no use any more; its end brings the next one.
  func backEndLost(_ report: DeviceReport) {
    guard let care = cares[report.id] else { return }
    switch care.kind {
    case .program, .jailed:
      guard case .none = care.step else { return }
      noteLoss(care, report.reason)
      processes.first { $0.id == report.id }?.signal(9)
    case .external(let path):
      guard care.step == .none else { return }
      noteLoss(care, report.reason)
      switch care.policy.action {
      case .restart:
        care.step = .due(.now.advanced(by: care.reconnectDelay(.now)))
        say(.warning, "Back end of \(report.id) at '\(path)' is gone (\(report.reason)); connecting until it is back")
      case .stopVM:
        say(.error, "Back end of \(report.id) at '\(path)' is gone; the VM ends, as on-death=stop-vm says")
        end(.device, askCore: true)
      case .hold, .fail:
        care.step = .held
        note(.held, care.id)
      }
    }
  }

  /// The device is not served any more, or its next back end has failed before it was.
  private func noteLoss(_ care: DeviceCare, _ why: String, _ values: KeyValuePairs<String, UInt64> = [:]) {
    if care.lostTime == nil {
      care.lostTime = .now
      note(.lost, care.id, why, values)
    } else if values.first != nil, care.step != .none {
      note(.startFailed, care.id, why, values)
    }
  }

  func giveUp(_ care: DeviceCare, _ why: String) {
    care.step = .givenUp
    care.dropSuccessor()
    note(.givenUp, care.id, why)
    say(.error, why)
    _ = channel?.send(.giveUp(id: care.id))
  }

  /// The core's answer to `reattach`; false when the answer is to something else.
  func answerReattach(_ sequence: UInt32, _ message: CoreMessage) -> Bool {
    guard let care = cares.values.first(where: { $0.step == .reattaching(sequence: sequence) }) else { return false }
    switch message {
    case .done:
      let gap = MonotonicTime.now.since(care.lostTime ?? .now)
      care.succeeded()
      // Counted by the process, in memory, before it answered the core; what it says there is believed for show only.
      let replays = statistics[care.id]?.queues.reduce(UInt64(0)) { $0 &+ $1[.replays] } ?? 0
      if replays > care.replayCount { note(.replayed, care.id, "", ["requests": replays - care.replayCount]) }
      care.replayCount = replays
      note(.restarted, care.id, "", ["gap_ns": UInt64(clamping: gap.nanoseconds), "restarts": UInt64(care.restartCount)])
      say(.info, "Device \(care.id) is served again, \(gap.nanoseconds / 1_000_000) ms after its back end was lost")
      if care.policy.hasSpare, care.spare == nil, care.spareDue == nil { care.spareDue = .now }
    case .refused(let sentence):
      note(.startFailed, care.id, sentence)
      say(.warning, "The new back end of \(care.id) cannot be used: \(sentence)")
      switch care.kind {
      // Its end counts as a death, and decides how it goes on.
      case .program, .jailed:
        care.step = .none
        processes.first { $0.id == care.id }?.signal(9)
      case .external: care.step = .due(.now.advanced(by: .seconds(1)))
      }
    default: break
    }
    return true
  }
}
