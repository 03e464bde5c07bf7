import ControlProtocol
import Glibc
import HostSystem

/// `martlet ctl replace` (protocol/recovery.md): another back end beside the one that serves; looked at, changed over to, and the
/// old one ended. Whatever fails, the old one serves on.
extension Supervisor {
  /// How long a process may take to end.
  private static let endGrace = Duration.seconds(2)
  /// More than all the core's own deadlines together; it catches a core that hangs.
  static let exchangeGrace = Duration.seconds(120)

  // MARK: the order

  /// A client's connection has such an order at its front.
  func handleReplacement(_ line: String, from client: Int, _ number: CInt) {
    var offered: ChildIdentity?
    do throws(SupervisionError) {
      let order: ReplaceOrder
      do { order = try ReplaceOrder(line: line) } catch { throw .launch(error.message) }
      try checkReplacement(order)
      takeover.intent = .replacement(order.id)
      publish()
      offered = identities.next()
      var opened: Spawner.Opened?
      if let spawner { opened = try spawner.order(from: number, offered) }
      let plan: ReplacementPlan
      do throws(SupervisionError) {
        plan = try self.plan(order, opened: opened?.resources)
      } catch {
        spawner?.drop(order.id)
        throw error
      }
      let identity = opened?.takesIdentity == false ? nil : offered
      if case .external = plan.care.kind {
      } else if opened?.takesIdentity != false {
        offered = nil
      }
      replacement = Replacement(
        order: order, line: line, client: client, care: plan.care, configuration: plan.configuration, extraArguments: plan.extraArguments,
        hasOtherImage: opened.map { $0.text == Spawner.otherImage } ?? claims.has(Self.candidateName(order.id)),
        deadline: .now.advanced(by: .milliseconds(configuration.deadlines.ready)))
      start(plan, identity)
    } catch { refuse(client, error.message ?? "The back end cannot be replaced") }
    takeover.intent = nil
    if let offered { identities.release(offered) }
  }

  private func checkReplacement(_ order: ReplaceOrder) throws(SupervisionError) {
    guard phase == .running else { throw .launch(phase == .starting ? "The VM is still starting; ask again" : "The VM is ending") }
    let id = order.id
    guard let care = cares[id], assignments.contains(where: { $0.id == id }) else {
      let names = assignments.map(\.id)
      let near = EditDistance.nearest(to: id, in: names).map { "; did you mean '\($0)'?" } ?? ""
      throw .launch("There is no device '\(id)'\(near) This VM has \(names.isEmpty ? "none" : names.joined(separator: ", "))")
    }
    if let replacement { throw .launch("\(replacement.id) is being given another back end; ask again when that is over") }
    if departures[id] != nil { throw .launch("Device '\(id)' is being removed") }
    switch care.step {
    case .none, .held, .givenUp: return
    default: throw .launch("The back end of \(id) has just died and is being started again; ask again")
    }
  }

  // MARK: the candidate

  private func start(_ plan: ReplacementPlan, _ identity: ChildIdentity?) {
    guard let id = replacement?.id else { return }
    let name = Self.candidateName(id)
    cares[name] = plan.care
    do throws(SupervisionError) {
      let null = spawner == nil ? try HostFiles.null().release() : -1
      defer { if null >= 0 { close(null) } }
      switch plan.care.kind {
      case .external:
        plan.care.socket = plan.resources.first
        candidateIsReady()
      case .jailed(let jailed):
        plan.care.socket = try startJailed(jailed, null: null, inPlaceOf: vacancies.popLast(), isNew: true, identity: identity).ours
      case .program(let program, let arguments, let isOnTerminal):
        let pair = try Self.pair(.stream)
        // They count in the same place. Behind our walls no other can be made.
        guard statistics[id] != nil || spawner == nil else {
          throw .launch(
            "A program of ours for \(id) needs memory to count in, which was not made when the VM started; use --jail or --socket")
        }
        statistics[name] = statistics[id]
        defer {
          if statistics[id] == nil { statistics[id] = statistics[name] }
          statistics[name] = nil
        }
        _ = try startBackEnd(
          name, program, ["--fd=3"] + arguments, socket: pair.second.rawValue, plan.resources, null: null,
          queueCount: max(1, reports[id]?.queues.count ?? 1), isOnTerminal: isOnTerminal, inPlaceOf: vacancies.popLast(), identity: identity
        )
        if plan.care.image != nil {
          if replacement?.hasOtherImage == false { plan.care.hasImage(of: cares[id]) }
          plan.care.started(plan.resources)
        }
        plan.care.socket = FDBox(pair.first)
      }
    } catch { failReplacement(error.message ?? "Its process cannot be started") }
  }

  func isCandidate(_ index: Int) -> Bool {
    guard let replacement else { return false }
    return processes[index].id == Self.candidateName(replacement.id)
  }

  /// It said READY, runs, or is connected.
  func candidateIsReady() {
    guard let replacement, replacement.step == .starting, let socket = replacement.care.socket else { return }
    replacement.care.socket = nil
    ask(.examine(id: replacement.id), [socket.number]) { .examining(sequence: $0) }
    socket.close()
  }

  private func ask(_ message: SupervisorMessage, _ descriptors: [CInt], _ step: (UInt32) -> Replacement.Step) {
    guard case .sent(let sequence)? = channel?.send(message, descriptors: descriptors) else {
      return failReplacement("The core process takes no requests")
    }
    replacement?.step = step(sequence)
    replacement?.deadline = .now.advanced(by: Self.exchangeGrace)
  }

  // MARK: the core's answers

  /// False when the answer is to something else.
  func answerReplacement(_ sequence: UInt32, _ message: CoreMessage) -> Bool {
    guard var replacement else { return false }
    switch (replacement.step, message) {
    case (.examining(sequence), .examined(let findings)):
      replacement.findings = findings
      self.replacement = replacement
      if let refusal = findings.first(where: { $0.verdict == .refusal }) {
        failReplacement("The new back end of \(replacement.id) is refused: \(refusal.subject): \(refusal.sentence)")
      } else if replacement.order.isDryRun {
        endCandidate(.object([.init("ok", .bool(true)), .init("dry_run", .bool(true))] + describe(findings)))
      } else {
        openAhead(replacement.care, as: Self.candidateName(replacement.id))
        self.replacement?.exchangeTime = .now
        ask(.exchange(id: replacement.id, drain: replacement.order.drain), []) { .exchanging(sequence: $0) }
      }
    case (.exchanging(sequence), .done): candidateServes()
    case (.examining(sequence), .refused(let sentence)): failReplacement("The new back end of \(replacement.id) is refused: \(sentence)")
    case (.exchanging(sequence), .refused(let sentence)):
      failReplacement("The new back end of \(replacement.id) did not take over: \(sentence); the one before serves on")
    default: return false
    }
    return true
  }

  private func describe(_ findings: [CoreMessage.Finding]) -> [JSONValue.Member] {
    let names: [CoreMessage.Finding.Verdict: String] = [.fine: "fine", .note: "note", .refusal: "refused"]
    return [
      .init(
        "findings",
        .array(
          findings.map {
            .record(["subject": .string($0.subject), "verdict": .string(names[$0.verdict] ?? ""), "text": .string($0.sentence)])
          }))
    ]
  }

  /// The guest's requests go to the new one. The old one's process is not needed any more.
  private func candidateServes() {
    guard var replacement else { return }
    let id = replacement.id
    replacement.gap = MonotonicTime.now.since(replacement.exchangeTime)
    replacement.isDone = true
    let old = cares[id]
    replacement.care.restartCount = old?.restartCount ?? 0
    // The former one is nobody's any more.
    if replacement.hasOtherImage { claims.release(id) }
    adopt(id, replacement.care, replacement.configuration, replacement.extraArguments)
    spawner?.adopt(id)
    let microseconds = UInt64(clamping: replacement.gap.nanoseconds / 1000)
    replacement.answer = .object(
      [.init("ok", .bool(true)), .init("gap_us", .unsigned(microseconds)), .init("program", .string(programName(replacement.care)))]
        + describe(replacement.findings))
    self.replacement = replacement
    // A spare is of the former kind; its end brings the next one.
    if let spare = old?.spare {
      spare.socket.close()
      spare.image?.close()
      processes[spare.index].signal(SIGKILL)
    } else if replacement.care.policy.hasSpare {
      replacement.care.spareDue = .now
    }
    note(
      replacement.order.source == .same && replacement.order.disk == nil ? .upgraded : .replaced, id, programName(replacement.care),
      ["gap_ns": UInt64(clamping: replacement.gap.nanoseconds)])
    say(
      .info,
      "Device \(id) is served by \(programName(replacement.care)) now; its rings stood still for \(Self.milliseconds(replacement.gap)) ms")
    for process in processes where process.id == id { process.id = Self.retiredName(id) }
    for process in processes where process.id == Self.candidateName(id) { process.id = id }
    end(Self.retiredName(id))
  }

  private func programName(_ care: DeviceCare) -> String {
    switch care.kind {
    case .program(let program, _, _): program
    case .jailed(let jailed): jailed.name
    case .external(let path): "the back end at '\(path)'"
    }
  }

  private static func milliseconds(_ time: Duration) -> String {
    let microseconds = time.nanoseconds / 1000
    return "\(microseconds / 1000).\(String(1000 + microseconds % 1000).dropFirst())"
  }

  // MARK: the end

  /// It does not take over; the old one serves on when its process has ended.
  func failReplacement(_ why: String) {
    guard let replacement else { return }
    var members: [JSONValue.Member] = [.init("ok", .bool(false)), .init("error", .string(why + replacement.candidateEnd))]
    if !replacement.findings.isEmpty { members += describe(replacement.findings) }
    endCandidate(.object(members))
  }

  private func endCandidate(_ answer: JSONValue) {
    guard let id = replacement?.id else { return }
    replacement?.answer = answer
    end(Self.candidateName(id))
  }

  /// Ends the process of that name, if there is one, and goes on when it has ended. It has nothing to put right: what it was
  /// given is another's, which may be at work already.
  private func end(_ name: String) {
    replacement?.step = .ending
    replacement?.deadline = .now.advanced(by: Self.endGrace)
    guard let process = processes.first(where: { $0.id == name }), process.isAlive else { return finishReplacement() }
    process.signal(process.jail == nil || replacement?.isDone == false ? SIGKILL : SIGTERM)
  }

  /// Whether the process belongs to a replacement, and its end is no death.
  func replacementNeeds(_ index: Int) -> Bool {
    guard let replacement else { return false }
    return processes[index].id == Self.retiredName(replacement.id) || isCandidate(index)
  }

  func replacedOrCandidateEnded(_ index: Int, _ end: ProcessEnd) {
    guard let replacement else { return }
    switch replacement.step {
    case .ending: finishReplacement()
    case .starting:
      failReplacement("\(processes[index].program) \(end) before it was ready; its messages may say why, and the one before serves on")
    // The core notices too, and answers.
    case .examining, .exchanging: self.replacement?.candidateEnd = "; \(processes[index].program) \(end), and its messages may say why"
    }
  }

  /// Only one of the two is left.
  private func finishReplacement() {
    guard let replacement else { return }
    let id = replacement.id
    _ = channel?.send(.forget(id: id))
    if !replacement.isDone {
      replacement.care.socket?.close()
      dropCandidate(id)
      spawner?.drop(id)
    }
    let name = replacement.isDone ? Self.retiredName(id) : Self.candidateName(id)
    if let index = processes.firstIndex(where: { $0.id == name }) {
      quietEnds.removeAll { $0.index == index }
      if let line = escapeLines.removeValue(forKey: index) {
        loop.remove(number: line.number)
        line.close()
      }
      if let identity = processes[index].retire() { identities.release(identity) }
      vacancies.append(index)
    }
    self.replacement = nil
    if let answer = replacement.answer { reply(replacement.client, answer) }
  }

  /// The VM ends.
  func dropReplacement() {
    guard let replacement else { return }
    replacement.care.socket?.close()
    refuse(replacement.client, "The VM is ending")
    self.replacement = nil
  }

  // MARK: time

  func replacementDue(_ now: MonotonicTime) {
    guard let replacement, let deadline = replacement.deadline, deadline <= now else { return }
    switch replacement.step {
    case .starting:
      failReplacement(
        "The new process of \(replacement.id) was not ready within \(configuration.deadlines.ready) ms; look at its messages or raise --deadline ready="
      )
    case .examining, .exchanging: failReplacement("The core process did not answer in time")
    case .ending:
      self.replacement?.deadline = now.advanced(by: Self.endGrace)
      let names = [Self.retiredName(replacement.id), Self.candidateName(replacement.id)]
      for process in processes where names.contains(process.id) { process.signal(SIGKILL) }
    }
  }
}
