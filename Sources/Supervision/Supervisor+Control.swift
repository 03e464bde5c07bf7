import ControlProtocol
import Glibc
import HostSystem
import VirtioSpec

extension Supervisor {
  private static let answerDeadline = Duration.seconds(5)
  /// For what is told also without the core's answer.
  private static let lookDeadline = Duration.milliseconds(500)

  func acceptClients() {
    guard let control else { return }
    for client in control.accept() { try? watch(client.number, .client(client.id)) }
  }

  func handleClient(_ id: Int) {
    guard let control else { return }
    control.flush(id)
    switch control.read(id) {
    case .closed(let number): loop.remove(number: number)
    case .order(let line): handleOrder(line, from: id)
    case .lines(let lines): for line in lines { handleRequest(line, from: id) }
    }
    adjustClients()
  }

  /// Watches for room those whose answers did not fit, and no others.
  func adjustClients() {
    for (number, readiness) in control?.takeWatchChanges() ?? [] { try? loop.modify(number: number, for: readiness) }
  }

  private func handleRequest(_ line: String, from client: Int) {
    let words = line.split(separator: " ").map(String.init)
    guard let verb = ControlVerb(rawValue: words.first ?? "") else {
      let near = EditDistance.nearest(to: words.first ?? "", in: ControlVerb.allCases.map(\.rawValue))
      return refuse(client, "Unknown request '\(line)'\(near.map { "; did you mean '\($0)'?" } ?? "")")
    }
    let arguments = Array(words.dropFirst())
    guard (verb.neededArguments...verb.arguments.count).contains(arguments.count) else {
      return refuse(client, "The request is '\(verb.usage)'")
    }
    let message: SupervisorMessage
    switch verb {
    case .stats: return tellStatistics(arguments.first, to: client)
    case .resizeDisk: return resizeDisk(arguments, for: client)
    case .events: return tellEvents(arguments, to: client)
    case .add, .replace:
      return refuse(client, "An order that names files or programs is one line, of at most \(Spawner.orderLimit) bytes, sent in one piece")
    case .upgrade: return refuse(client, "An upgrade replaces one device after the other, then the supervisor; martlet ctl asks for each")
    case .remove: return removeDevice(arguments, for: client)
    case .upgradeSupervisor: return beginUpgrade(arguments, for: client)
    case .devices:
      guard phase == .running else { return tellDevices(client) }
      message = .look
    case .conversation:
      guard let message = askConversation(arguments[0], for: client) else { return }
      return ask(message, verb, client, within: Self.answerDeadline, about: arguments[0])
    case .info: message = .information
    case .pause: message = .pause
    case .resume: message = .resume
    case .powerButton: message = .powerButton
    case .reboot: message = .reboot
    case .shutdown: message = .shutdown
    }
    guard phase == .running else {
      if verb == .info { return reply(client, describeVM(nil)) }
      return refuse(client, phase == .starting ? "The VM is still starting; ask again" : "The VM is ending")
    }
    ask(message, verb, client, within: verb == .devices ? Self.lookDeadline : Self.answerDeadline)
  }

  private func ask(_ message: SupervisorMessage, _ verb: ControlVerb, _ client: Int, within time: Duration, about device: String? = nil) {
    guard case .sent(let sequence) = channel?.send(message) else {
      return verb == .devices ? tellDevices(client) : refuse(client, "The core process takes no requests")
    }
    pending.append(PendingRequest(sequence: sequence, client: client, verb: verb, deadline: .now.advanced(by: time), device: device))
  }

  private func tellDevices(_ client: Int) {
    reply(client, .record(["ok": .bool(true), "devices": .array(describeDevices())]))
  }

  /// The core has answered a request.
  func answer(_ sequence: UInt32, _ message: CoreMessage) {
    guard let index = pending.firstIndex(where: { $0.sequence == sequence }) else { return }
    let request = pending.remove(at: index)
    switch message {
    case .conversation(_, let text): tell(text, to: request.client)
    case .refused where request.verb == .conversation && conversations[request.device ?? ""] != nil:
      tell(conversations[request.device ?? ""] ?? "", to: request.client)
    case _ where request.verb == .devices: tellDevices(request.client)
    case .refused(let sentence): refuse(request.client, sentence)
    case .information(let information): reply(request.client, describeVM(information))
    default: reply(request.client, .record(["ok": .bool(true)]))
    }
  }

  func expireRequests(_ now: MonotonicTime) {
    while let index = pending.firstIndex(where: { $0.deadline <= now }) {
      let request = pending.remove(at: index)
      if request.verb == .devices {
        tellDevices(request.client)
        continue
      }
      refuse(request.client, request.lateAnswer ?? "The core process did not answer '\(request.verb.rawValue)' in time")
    }
  }

  func refuse(_ client: Int, _ sentence: String) {
    reply(client, .record(["ok": .bool(false), "error": .string(sentence)]))
  }

  func reply(_ client: Int, _ value: JSONValue) {
    control?.write(Self.line(value), to: client)
    adjustClients()
  }

  // MARK: Descriptions

  private func describeVM(_ information: VMInformation?) -> JSONValue {
    var members: [JSONValue.Member] = [
      .init("ok", .bool(true)), .init("name", .string(configuration.name)),
      .init("state", .string(information?.state.name ?? (phase == .starting ? "starting" : "ending"))),
      .init("cpus", .unsigned(UInt64(configuration.cpuCount))), .init("memory", .unsigned(configuration.memorySize)),
      .init("kernel", .string(configuration.kernel)), .init("supervisor", .unsigned(UInt64(getpid()))),
      .init("upgrades", .unsigned(UInt64(upgrade.count))), .init("keeper", keeper.map { .unsigned(UInt64($0.processID)) } ?? .null),
      .init("takeovers", .unsigned(UInt64(takeover.count))), .init("sandbox", .string(walls.mode.rawValue)),
      .init("namespaces", .array(walls.namespaces.names.map { .string($0) })),
      .init("cgroup", groups.map { .string($0.directory) } ?? .null),
      .init(
        "controllers",
        .array(ControlGroups.Controller.allCases.filter { groups?.controllers.contains($0) == true }.map { .string($0.rawValue) })),
    ]
    if let groupsLack { members.append(.init("no_cgroup", .string(groupsLack))) }
    if let information {
      members.append(.init("uptime_ns", .unsigned(information.uptime)))
      members.append(.init("resets", .unsigned(UInt64(information.resetCount))))
      members.append(
        .init("counters", .object(information.counters.map { .init($0.name, .unsigned($0.value)) })))
    }
    members.append(.init("processes", .array(processes.filter { !$0.isRetired }.map { .object(describe($0)) })))
    return .object(members)
  }

  private func describe(_ process: VMProcess) -> [JSONValue.Member] {
    var state = "starting"
    switch process.state {
    case .starting: break
    case .ready: state = "running"
    case .ended(let end): state = end.description
    }
    let usage = usage(of: process)
    let ready = process.readyTime.map { UInt64(clamping: $0.since(process.startTime).nanoseconds) }
    return [
      .init("id", .string(process.id)), .init("program", .string(process.program)),
      .init("pid", .unsigned(UInt64(process.processID))),
      .init("uid", .unsigned(UInt64(process.identity?.uid ?? userID))), .init("process", .string(state)),
      .init("ready_ns", ready.map { .unsigned($0) } ?? .null),
      .init("cpu_ns", usage?[.processorTime].map { .unsigned($0) } ?? .null),
      .init(
        "usage", .object(ProcessUsage.Key.allCases.compactMap { key in usage?[key].map { .init(key.rawValue, .unsigned($0)) } })),
    ]
  }

  private static func describe(_ queue: DeviceReport.Queue) -> JSONValue {
    var members: [JSONValue.Member] = [.init("size", .unsigned(UInt64(queue.size))), .init("enabled", .bool(queue.isEnabled))]
    if queue.waitingSince > 0 {
      let time = MonotonicTime.now.since(MonotonicTime(nanoseconds: queue.waitingSince))
      members.append(.init("waiting_ns", .unsigned(UInt64(clamping: time.nanoseconds))))
      members.append(.init("waiting", queue.waitingCount > 0 ? .unsigned(UInt64(queue.waitingCount)) : .null))
    }
    return .object(members)
  }

  /// Every device, in the order of its PCI slot; external back ends have no pid of ours.
  private func describeDevices() -> [JSONValue] {
    assignments.map { assignment in
      var members: [JSONValue.Member] = []
      if let process = processes.first(where: { $0.id == assignment.id }) {
        members = describe(process)
      } else {
        members = [.init("id", .string(assignment.id)), .init("program", .string("external")), .init("pid", .null), .init("uid", .null)]
      }
      members.append(.init("type", .string(assignment.deviceType.description)))
      members.append(.init("slot", .unsigned(UInt64(assignment.pciSlot))))
      let report = reports[assignment.id]
      members.append(.init("restarts", .unsigned(UInt64(cares[assignment.id]?.restartCount ?? 0))))
      if let spare = cares[assignment.id]?.spare {
        members.append(
          .init("spare", .record(["pid": .unsigned(UInt64(processes[spare.index].processID)), "ready": .bool(spare.isReady)])))
      }
      members.append(.init("events", journal.describeCounts(of: assignment.id)))
      members.append(.init("state", .string(report?.state.name ?? "waiting")))
      if let reason = report?.reason, !reason.isEmpty { members.append(.init("reason", .string(reason))) }
      let queues = report?.queues ?? assignment.queueSizes.map { .init(size: $0, isEnabled: false) }
      members.append(
        .init(
          "queues",
          .array(queues.map(Self.describe))))
      let features = report?.features ?? []
      members.append(.init("features", .array(features.names(for: assignment.deviceType).map { .string($0) })))
      members.append(
        .init(
          "protocol_features", .array(ProtocolFeatureName.names(report?.protocolFeatures ?? 0).map { .string($0) })))
      return .object(members)
    }
  }
}
