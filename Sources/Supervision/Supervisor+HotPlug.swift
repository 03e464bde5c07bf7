import ControlProtocol
import Glibc
import HostSystem

/// A device on its way into a VM that runs.
struct Addition {
  /// Who asked for it.
  let client: Int
  var assignment: DeviceAssignment
  /// For the person, such as the path of a pseudo-terminal.
  let text: String
  /// When its process must have said READY.
  let deadline: MonotonicTime
  /// The core's answer is awaited.
  var sequence: UInt32?
}

/// A device that the core has done with, or that never came so far: its process is to end.
struct Departure {
  var answers: [(client: Int, value: JSONValue)]
  var deadline: MonotonicTime
}

/// `martlet ctl add` and `remove`.
extension Supervisor {
  /// How long a process may take after the end of its socket.
  private static let departureGrace = Duration.seconds(2)
  static let removalTimeout: UInt64 = 10_000

  // MARK: coming

  /// A client's connection has an order at its front.
  func handleOrder(_ line: String, from client: Int) {
    guard let control, let number = control.number(of: client) else { return }
    // The spawner looks at it where it waits; it is taken out here, whatever becomes of it.
    defer { control.takeOrder(from: client) }
    if line.hasPrefix("\(ReplaceOrder.verb) ") { return handleReplacement(line, from: client, number) }
    guard phase == .running else { return refuse(client, phase == .starting ? "The VM is still starting; ask again" : "The VM is ending") }
    var offered: ChildIdentity?
    do throws(SupervisionError) {
      let order = try Self.order(String(line.dropFirst(DeviceOrder.verb.utf8.count + 1)))
      // Most mistakes are found here, without anybody else.
      do { takeover.intent = .addition(try configuration.adding(order).id) } catch { throw .launch(error.message) }
      publish()
      offered = identities.next()
      var opened: Spawner.Opened?
      if let spawner { opened = try spawner.order(from: number, offered) }
      let (plan, text) = try self.plan(order, opened: opened?.resources)
      if let file = opened?.statistics {
        statistics[plan.assignment.id] = try attempt { () throws(SystemError) in
          try StatisticsMemory(adopting: file, queueCount: plan.assignment.queueSizes.count)
        } or: {
          .system($0)
        }
      }
      let identity = offered
      if case .external = plan.backEnd {
      } else if opened?.takesIdentity != false {
        offered = nil
      }
      add(plan, opened?.text ?? text, identity, client)
    } catch { refuse(client, error.message ?? "The device cannot be added") }
    takeover.intent = nil
    if let offered { identities.release(offered) }
  }

  /// Starts the device's process or hands its connection over; the answer follows.
  private func add(_ plan: DevicePlan, _ text: String, _ identity: ChildIdentity?, _ client: Int) {
    let id = plan.assignment.id
    additions[id] = Addition(
      client: client, assignment: plan.assignment, text: text,
      deadline: .now.advanced(by: .milliseconds(configuration.deadlines.ready)))
    do throws(SupervisionError) {
      let null = spawner == nil ? try HostFiles.null().release() : -1
      defer { if null >= 0 { close(null) } }
      switch plan.backEnd {
      case .external(let socket): try handOverAddition(id, socket)
      case .jailed(let jailed):
        let place = vacancies.popLast()
        let (index, ours) = try startJailed(jailed, null: null, inPlaceOf: place, isNew: true, identity: identity)
        if let ours { waitingSockets[index] = (plan.assignment, ours) } else { waitingAssignments[index] = plan.assignment }
      case .program(let program, let arguments, let resources, let isOnTerminal):
        let pair = try Self.pair(.stream)
        let index = try startBackEnd(
          id, program, ["--fd=3"] + arguments, socket: pair.second.rawValue, resources, null: null,
          queueCount: plan.assignment.queueSizes.count, isOnTerminal: isOnTerminal, inPlaceOf: vacancies.popLast(), isNew: true,
          identity: identity)
        cares[id]?.started(resources)
        if let care = cares[id] { openAhead(care) }
        waitingSockets[index] = (plan.assignment, FDBox(pair.first))
      }
    } catch { abandon(id, error.message ?? "Its process cannot be started") }
  }

  /// Its back end is ready, or connected.
  func handOverAddition(_ id: String, _ socket: FDBox) throws(SupervisionError) {
    guard let addition = additions[id] else { return }
    additions[id]?.sequence = try send(.device(addition.assignment), [socket.number])
    socket.close()
  }

  /// The core's answer to `device`; false when the answer is to something else.
  func answerAddition(_ sequence: UInt32, _ message: CoreMessage) -> Bool {
    guard let (id, addition) = additions.first(where: { $0.value.sequence == sequence }) else { return false }
    switch message {
    case .plugged(let slot):
      additions[id] = nil
      var assignment = addition.assignment
      assignment.pciSlot = slot
      assignments.append(assignment)
      assignments.sort { $0.pciSlot < $1.pciSlot }
      note(.added, id, "", ["slot": UInt64(slot)])
      say(.info, "Device \(id) is added, in slot \(slot)")
      if let care = cares[id], care.policy.hasSpare { care.spareDue = .now }
      var members: [JSONValue.Member] = [
        .init("ok", .bool(true)), .init("id", .string(id)), .init("type", .string(assignment.deviceType.description)),
        .init("slot", .unsigned(UInt64(slot))),
      ]
      if !addition.text.isEmpty { members.append(.init("text", .string(addition.text))) }
      reply(addition.client, .object(members))
    case .refused(let sentence):
      additions[id]?.sequence = nil
      abandon(id, explained(.device, sentence))
    default: abandon(id, "The core process gave an answer without sense")
    }
    return true
  }

  /// The device does not come; nothing of it stays.
  func abandon(_ id: String, _ why: String) {
    guard let addition = additions.removeValue(forKey: id) else { return }
    // The core may have put it on the bus meanwhile.
    if addition.sequence != nil { _ = channel?.send(.unplug(id: id, isForced: true)) }
    for index in processIndices(of: id) { processes[index].signal(SIGKILL) }
    depart(id, [(addition.client, .record(["ok": .bool(false), "error": .string(why)]))])
  }

  // MARK: going

  func removeDevice(_ arguments: [String], for client: Int) {
    var timeout = Self.removalTimeout
    var isForced = false
    for word in arguments.dropFirst() {
      if word == "force" {
        isForced = true
      } else if word.hasPrefix("timeout="), let number = Quantity.unsigned(String(word.dropFirst(8))),
        (1...VMConfiguration.Limits.milliseconds).contains(number)
      {
        timeout = number
      } else {
        return refuse(client, "'\(word)' is not force, and not timeout= with 1 to \(VMConfiguration.Limits.milliseconds) milliseconds")
      }
    }
    guard phase == .running else { return refuse(client, phase == .starting ? "The VM is still starting; ask again" : "The VM is ending") }
    let id = arguments[0]
    if additions[id] != nil { return refuse(client, "Device '\(id)' is still being added; ask again") }
    if departures[id] != nil { return refuse(client, "Device '\(id)' is being removed already") }
    if replacement?.id == id { return refuse(client, "Device '\(id)' is being given another back end; ask again") }
    guard assignments.contains(where: { $0.id == id }) else {
      let names = assignments.map(\.id)
      let near = EditDistance.nearest(to: id, in: names).map { "; did you mean '\($0)'? This" } ?? "; this"
      return refuse(client, "There is no device '\(id)'\(near) VM has \(names.isEmpty ? "none" : names.joined(separator: ", "))")
    }
    guard case .sent(let sequence) = channel?.send(.unplug(id: id, isForced: isForced)) else {
      return refuse(client, "The core process takes no requests")
    }
    if !isForced { serveHeld(id) }
    pending.append(
      PendingRequest(
        sequence: sequence, client: client, verb: .remove, deadline: .now.advanced(by: .milliseconds(Int64(timeout))), device: id,
        lateAnswer: isForced
          ? "The back end of '\(id)' does not stop; the guest has lost the device, and the rest follows when it does"
          : "The guest has not let go of '\(id)' within \(timeout) ms; it stays until the guest does, or is reset, or until remove --force")
    )
  }

  /// A driver waits for the answers to all it has asked before it lets go of a device, and most wait for ever. So a device that is held
  /// is served once more.
  private func serveHeld(_ id: String) {
    guard let care = cares[id], care.step == .held else { return }
    switch care.kind {
    case .external: return
    case .program, .jailed:
      say(.info, "The device \(id), which is held, is served once more, so that the guest can let go of it")
      care.step = .due(.now)
    }
  }

  /// The core has done with a device: asked for, or because the guest let go of it by itself.
  func deviceIsUnplugged(_ id: String) {
    guard assignments.contains(where: { $0.id == id }), departures[id] == nil else { return }
    let asking = pending.filter { $0.device == id && $0.verb == .remove }
    pending.removeAll { $0.device == id }
    depart(id, asking.map { ($0.client, .record(["ok": .bool(true), "id": .string(id)])) })
  }

  /// Waits for the end of its process, which has lost its connection; then nothing is left.
  func depart(_ id: String, _ answers: [(client: Int, value: JSONValue)]) {
    departures[id] = Departure(answers: answers, deadline: .now.advanced(by: Self.departureGrace))
    if let care = cares[id] {
      care.step = .givenUp
      care.dropSuccessor()
      care.spare?.socket.close()
    }
    for index in processIndices(of: id) where processes[index].isAlive {
      waitingSockets[index] = nil
      waitingAssignments[index] = nil
      // Programs of others do not end when their connection does.
      if processes[index].jail != nil { processes[index].signal(SIGTERM) }
    }
    finishDeparture(id)
  }

  /// The device's process and its spare.
  func processIndices(of id: String) -> [Int] {
    processes.indices.filter { processes[$0].id == id || processes[$0].id == Self.spareName(id) }
  }

  /// The device whose departure waits for the end of this process.
  func departing(_ process: VMProcess) -> String? {
    departures.keys.first { process.id == $0 || process.id == Self.spareName($0) }
  }

  /// Its processes, if it had any, are gone.
  func finishDeparture(_ id: String) {
    let places = processIndices(of: id)
    guard places.allSatisfy({ !processes[$0].isAlive }), let departure = departures.removeValue(forKey: id) else { return }
    let wasThere = assignments.contains { $0.id == id }
    assignments.removeAll { $0.id == id }
    forget(id)
    spawner?.forget(id)
    reports[id] = nil
    statistics[id] = nil
    var identity: ChildIdentity?
    for index in places {
      quietEnds.removeAll { $0.index == index }
      if let line = escapeLines.removeValue(forKey: index) {
        loop.remove(number: line.number)
        line.close()
      }
      identity = processes[index].retire()
      vacancies.append(index)
    }
    if let identity { identities.release(identity) }
    if wasThere {
      note(.removed, id)
      say(.info, "Device \(id) is removed")
    }
    for answer in departure.answers { reply(answer.client, answer.value) }
  }

  // MARK: time

  func nextHotPlugStep() -> MonotonicTime? {
    (additions.values.compactMap { $0.sequence == nil ? $0.deadline : nil } + departures.values.map(\.deadline)).min()
  }

  func hotPlugDue(_ now: MonotonicTime) {
    for (id, addition) in additions where addition.sequence == nil && addition.deadline <= now {
      abandon(id, "Its process was not ready within \(configuration.deadlines.ready) ms; look at its messages or raise --deadline ready=")
    }
    for (id, departure) in departures where departure.deadline <= now {
      departures[id]?.deadline = now.advanced(by: Self.departureGrace)
      for index in processIndices(of: id) { processes[index].signal(SIGKILL) }
    }
  }
}
