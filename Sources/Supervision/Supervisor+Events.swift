import CLinux
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

extension Supervisor {
  func handle(_ token: Token) throws(SupervisionError) {
    switch token {
    case .signals:
      while let number = Signals.next(from: signals) { handleSignal(number) }
    case .core: try drainChannel()
    case .launchReport(let index): try handleLaunchReport(index)
    case .ready(let index): try handleReady(index)
    case .processEnd(let index): try handleEnd(index)
    case .spawnerEnd:
      if let spawner { loop.remove(number: spawner.endNumber) }
      if phase == .running { say(.warning, "The spawner has ended; device processes that die are not started again") }
    case .guardianEnd:
      guard let number = guardian.endNumber else { break }
      loop.remove(number: number)
      if phase == .running {
        say(
          .warning,
          "The guardian has ended; socket files, control groups and the terminal's settings are put right at the end of the VM only if the "
            + "supervisor is not killed")
      }
    case .controlListener: acceptClients()
    case .client(let id): handleClient(id)
    case .escapeKey(let index): handleEscapeKey(index)
    }
  }

  /// A person at our terminal typed the escape key: the VM ends as by `martlet ctl shutdown`.
  private func handleEscapeKey(_ index: Int) {
    guard let line = escapeLines[index], let word = line.readOnce(limit: 16) else { return }
    // The word itself, or the end of the line: then the process is gone, or going.
    loop.remove(number: line.number)
    escapeLines.removeValue(forKey: index)?.close()
    guard word == Array("quit\n".utf8) else { return }
    if phase == .starting {
      outcome = outcome ?? .success
      phase = .ended
    } else {
      end(.success, askCore: true)
    }
  }

  /// SIGTERM, SIGINT and SIGHUP end the VM at once and cleanly; a second one ends it the hard way.
  private func handleSignal(_ number: CInt) {
    if number == SIGWINCH {
      for process in processes where process.isOnTerminal { process.signal(SIGWINCH) }
      return
    }
    if phase == .starting || outcome != nil {
      outcome = outcome ?? .signal(number)
      phase = .ended
      return
    }
    end(.signal(number), askCore: true)
  }

  private func handleLaunchReport(_ index: Int) throws(SupervisionError) {
    let process = processes[index]
    switch process.launchOutcome() {
    case .pending: return
    case .executed:
      process.markExecuted()
      dropReport(process)
      return try jailedMayBeReady(index)
    case .failedAt(let stage, let errno, let place):
      let error = JailError.step(stage, errno, place: process.jail?.placeName(place))
      if phase == .running {
        say(.warning, error.message)
        break
      }
      throw .jail(process.id, error)
    case .failed(let stage, let errno):
      let remedy = walls.mode == .off ? "" : stage.remedy
      let sentence = "Cannot \(stage.action) of \(process.program) (\(process.id)): \(errno.explanation)\(remedy)"
      // Its end follows.
      if phase == .running, index != coreIndex {
        say(.warning, sentence)
        break
      }
      throw .launch(sentence)
    }
    dropReport(process)
  }

  private func dropReport(_ process: VMProcess) {
    if let number = process.reportNumber { loop.remove(number: number) }
    process.closeReport()
  }

  private func handleReady(_ index: Int) throws(SupervisionError) {
    let process = processes[index]
    guard let number = process.readyNumber else { return }
    let isReady = process.takeReadyWord()
    // Ready, or closed without the word: then its end is near and will be reported by the pidfd.
    loop.remove(number: number)
    process.closeReadyPipe()
    guard isReady else { return }
    process.readyTime = .now
    try handOver(index)
    try goOnStarting()
  }

  private func handleEnd(_ index: Int) throws(SupervisionError) {
    let process = processes[index]
    // What a process said last comes before its end.
    if index == coreIndex || phase == .running { try drainChannel() }
    // A word of READY may still be in the pipe of a process that ended right after it.
    if let number = process.readyNumber {
      loop.remove(number: number)
      process.closeReadyPipe()
    }
    // A failed step between fork and exec explains the end better than its exit code.
    if case .starting = process.state, process.reportNumber != nil { try handleLaunchReport(index) }
    guard let end = process.collect() else { return }
    loop.remove(number: process.endNumber)
    dropReport(process)
    if end == .killed(signal: SIGSYS), walls.mode != .off || process.jail != nil { say(.error, walls.violation(process)) }
    switch phase {
    case .starting where index == coreIndex:
      if end == .exited(code: 1) { throw .endedEarly(process: process.id, program: process.program, end: end) }
      throw .coreLost(end)
    case .running where index == coreIndex: throw .coreLost(end)
    case .running where replacementNeeds(index): replacedOrCandidateEnded(index, end)
    case .running where departing(process) != nil: if let id = departing(process) { finishDeparture(id) }
    case .running where additions[process.id] != nil: abandon(process.id, "\(process.program) of \(process.id) \(end) before it was ready")
    case .starting, .running:
      if end == .exited(code: 0), cares[process.id]?.lostTime == nil {
        // Usually because its socket ended: the core is dying, and a process closes its files before it can be waited
        // for. Only if the core lives on is it news. (A successor that the core has refused is no sign of that.)
        quietEnds.append((index, .now.advanced(by: Self.quietEndGrace)))
      } else {
        try report(process, end)
      }
    case .endingCore:
      if index == coreIndex { endDevices() }
    case .endingDevices, .ended: break
    }
    if case .endingDevices = phase, processes.allSatisfy({ !$0.isAlive }) { phase = .ended }
  }

  private static let quietEndGrace = Duration.milliseconds(500)

  /// A back end is gone: fatal before the guest runs, else told.
  private func report(_ process: VMProcess, _ end: ProcessEnd) throws(SupervisionError) {
    if phase == .starting { throw .endedEarly(process: process.id, program: process.program, end: end) }
    if phase == .running, backEndDied(process, end) { return }
    say(.warning, "\(process.program) of \(process.id) (pid \(process.processID)) \(end); the VM goes on without it")
  }

  /// Tells of devices that left without a sound while the core lives.
  func reportQuietEnds(_ now: MonotonicTime) throws(SupervisionError) {
    while let entry = quietEnds.first, entry.deadline <= now {
      quietEnds.removeFirst()
      if case .ended(let end) = processes[entry.index].state { try report(processes[entry.index], end) }
    }
  }

  // MARK: The core's messages

  func drainChannel() throws(SupervisionError) {
    guard let channel, channel.isOpen else { return }
    // Bounded by what the socket buffer holds: the core cannot keep us here, because other tokens come in between.
    for _ in 0..<64 {
      switch channel.receive() {
      case .nothing: return
      case .end:
        loop.remove(number: channel.number)
        return
      case .broken(let error): throw .coreProtocol(error)
      case .message(let message, let sequence):
        try handle(message, sequence)
        if keeper != nil {
          channel.handled()
          publish()
          channel.take()
        }
      }
    }
  }

  private func handle(_ message: CoreMessage, _ sequence: UInt32) throws(SupervisionError) {
    switch message {
    case .ready:
      coreIsReady = true
      core?.markReady()
      core?.readyTime = .now
      try goOnStarting()
    case .started:
      guestHasStarted = true
      try goOnStarting()
    case .done where sequence == takeover.look: takeover.look = nil
    case .done, .refused, .information, .plugged, .examined:
      if !answerReplacement(sequence, message), !answerAddition(sequence, message), !answerReattach(sequence, message) {
        answer(sequence, message)
      }
    case .unplugged(let id): deviceIsUnplugged(id)
    case .conversation(let id, let text):
      if sequence == 0 { keepConversation(id, text) } else { answer(sequence, message) }
    case .device(let report):
      let old = reports.updateValue(report, forKey: report.id)
      reconcile(report)
      if report.state == .connected || report.state == .active, old == nil || old?.state == .connecting { note(.connected, report.id) }
      if report.state == .needsReset, old?.state != .needsReset { note(.needsReset, report.id, report.reason) }
      if report.state == .waiting, old?.state != .waiting, case .running = phase { backEndLost(report) }
      if report.state == .needsReset || report.state == .lost, old?.state != report.state, case .running = phase {
        say(.warning, "Device \(report.id) is \(report.state.name)\(report.reason.isEmpty ? "" : ": " + report.reason)")
      }
    case .guest(let event): handle(event)
    case .failed(let kind, let sentence):
      if kind == .device { try tellOfDeadPrograms() }
      throw .core(kind, explained(kind, sentence))
    }
  }

  /// Somebody else's program counts as ready when it runs. One that ended then is what the core's complaint comes from, and its
  /// end says more.
  private func tellOfDeadPrograms() throws(SupervisionError) {
    for index in processes.indices where processes[index].jail != nil && processes[index].isAlive {
      var entry = pollfd(fd: processes[index].endNumber, events: Int16(POLLIN), revents: 0)
      // SAFETY: one entry of ours, alive for the call.
      if unsafe poll(&entry, 1, 200) > 0 { try handleEnd(index) }
    }
  }

  /// The core knows no paths; we add the one that its sentence is about.
  func explained(_ kind: CoreMessage.FailureKind, _ sentence: String) -> String {
    var text = Substring(sentence)
    if text.last == "." { text.removeLast() }
    switch kind {
    case .input where text.hasPrefix("Kernel"): return "'\(configuration.kernel)': \(text)"
    case .input where text.hasPrefix("Initramfs"): return "'\(configuration.initramfs ?? "")': \(text)"
    case .device:
      for assignment in assignments + additions.values.map(\.assignment) where text.hasPrefix("Device \(assignment.id): ") {
        guard let path = configuration.externalSocket(of: assignment.id) else { continue }
        return "Back end of \(assignment.id) at '\(path)': \(text.dropFirst("Device \(assignment.id): ".count)); "
          + "is it a vhost-user back end of type \(assignment.deviceType)?"
      }
    default: break
    }
    return String(text)
  }

  private func handle(_ event: CoreMessage.GuestEvent) {
    switch event {
    case .reset:
      note(.guestReset)
      Log.info("The guest was reset")
    case .panicked: say(.warning, "The guest's kernel panicked")
    case .poweredOff, .resetEnded, .shutDown: end(.success, askCore: false)
    case .crashed:
      say(.error, "The guest crashed and cannot run any more; its console may say why")
      end(.guestCrashed, askCore: false)
    }
  }
}
