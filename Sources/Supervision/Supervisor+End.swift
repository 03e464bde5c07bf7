import CLinux
import ControlProtocol
import HostSystem

extension Supervisor {
  /// How long the core may take to stop and hand the rings back.
  private static let coreGrace = Duration.seconds(5)
  /// How long devices may take after the end of their sockets, and again after SIGTERM.
  private static let deviceGrace = Duration.seconds(2)
  private static let signalGrace = Duration.seconds(1)

  /// Begins the orderly end. The first cause decides the exit code.
  /// - Parameter askCore: the core does not know yet.
  func end(_ code: ExitCode, askCore: Bool) {
    keeper?.retract()
    if outcome == nil { outcome = code }
    switch phase {
    case .starting, .running: break
    case .endingCore, .endingDevices, .ended: return
    }
    phase = .endingCore(.now.advanced(by: Self.coreGrace))
    if askCore {
      if case .sent = channel?.send(.shutdown) {} else { core?.signal(SIGKILL) }
    }
    startSerialAfterAll()
    if core?.isAlive != true { endDevices() }
  }

  /// The core is gone: with it the other ends of the device sockets, which is the devices' order to exit.
  func endDevices() {
    channel = nil
    dropSpares()
    dropReplacement()
    phase = .endingDevices(.now.advanced(by: Self.deviceGrace), signalled: false)
    if processes.allSatisfy({ !$0.isAlive }) { phase = .ended }
    endJailed()
  }

  /// The nearest moment at which something must be done; nil when nothing is due, and the loop sleeps without limit.
  func nextDeadline() -> MonotonicTime? {
    var nearest = pending.map(\.deadline).min()
    func consider(_ time: MonotonicTime) { nearest = nearest.map { min($0, time) } ?? time }
    if expectsSockets { consider(.now.advanced(by: JailedDevice.connectInterval)) }
    switch phase {
    case .starting:
      let limit = Duration.milliseconds(configuration.deadlines.ready)
      for process in processes where process.state == .starting { consider(process.startTime.advanced(by: limit)) }
      if let time = startDeadline { consider(time) }
      if let first = quietEnds.first { consider(first.deadline) }
    case .endingCore(let time), .endingDevices(let time, _): consider(time)
    case .running:
      if let first = quietEnds.first { consider(first.deadline) }
      if let time = nextHotPlugStep() { consider(time) }
      if let time = replacement?.deadline { consider(time) }
      for care in cares.values { if let time = care.nextStep(ready: configuration.deadlines.ready) { consider(time) } }
      if upgrade.asker != nil { consider(.now.advanced(by: UpgradeWork.interval)) }
    case .ended: break
    }
    return nearest
  }

  /// The core's own deadlines for its back ends end the start before this one does; it catches a core that hangs.
  private var startDeadline: MonotonicTime? {
    guard let handOverTime else { return nil }
    let allowance = 2 * UInt64(configuration.deadlines.ready) + 4 * UInt64(configuration.deadlines.reply)
    return handOverTime.advanced(by: .milliseconds(allowance))
  }

  func checkDeadlines(_ now: MonotonicTime) throws(SupervisionError) {
    expireRequests(now)
    if expectsSockets { try lookForSockets() }
    switch phase {
    case .starting:
      try reportQuietEnds(now)
      let limit = configuration.deadlines.ready
      for process in processes
      where process.state == .starting && process.startTime.advanced(by: .milliseconds(limit)) <= now {
        if process === core, let memory = HostFiles.totalMemory(), configuration.memorySize > memory {
          throw .memoryTooLarge(size: configuration.memorySize, host: memory, milliseconds: limit)
        }
        throw .notReady(process: process.id, program: process.program, milliseconds: limit)
      }
      if let time = startDeadline, time <= now {
        throw .core(.defect, "The core process does not start the VM and says nothing")
      }
    case .endingCore(let time) where time <= now:
      say(.warning, "The core process does not end by itself and is killed")
      core?.kill()
      endDevices()
    case .endingDevices(let time, let signalled) where time <= now:
      for process in processes where process.isAlive {
        if signalled {
          say(.warning, "\(process.program) of \(process.id) does not end and is killed")
          process.kill()
        } else {
          process.signal(SIGTERM)
        }
      }
      phase = signalled ? .ended : .endingDevices(now.advanced(by: Self.signalGrace), signalled: true)
    case .running:
      try reportQuietEnds(now)
      restartDue(now)
      hotPlugDue(now)
      replacementDue(now)
      goOnUpgrading(now)
    default: break
    }
  }
}
