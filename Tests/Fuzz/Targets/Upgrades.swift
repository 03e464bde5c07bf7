import HostSystem
import Sandbox

@testable import ControlProtocol
@testable import Supervision

// What one program of a VM leaves to the next, and what clients order: both are read by processes with more rights than the writer.

let upgradeStates = Target(
  name: "upgrade-states", about: "the states that a supervisor and a spawner hand on in an upgrade",
  seeds: { [fullState().encode(), smallState().encode(), spawnerState(isFull: true).encode(), spawnerState(isFull: false).encode()] },
  words: ["--kernel", "--disk", "path=", "blk0", "disk", "on", "off", "log", "martlet-", "cpu", "pids", "\u{1}\u{0}", "MLUP", "MLSP"],
  run: { script in
    let bytes = script.rest()
    if let state = try? SupervisorState.decode(bytes) { examine(state) }
    guard let state = try? SpawnerState.decode(bytes) else { return }
    let written = state.encode()
    guard let again = try? SpawnerState.decode(written) else { return demand(false, "what a spawner hands on cannot be read") }
    demand(again.encode() == written, "a spawner's state changes on its way")
    demand(state.identitiesUsed <= Identities.perVM, "\(state.identitiesUsed) ids in use")
    follow(state.arguments, state.changes)
  })

private func examine(_ state: SupervisorState) {
  demand((try? SupervisorState.decode(state.encode())) == state, "a supervisor's state changes on its way")
  // Whoever takes over closes each of them once, and none that is its own.
  let descriptors = state.descriptors
  demand(descriptors.allSatisfy { (3..<4096).contains($0) }, "descriptors \(descriptors)")
  demand(Set(descriptors).count == descriptors.count, "a descriptor is named twice: \(descriptors)")
  let indices = state.escapeLines.map(\.index) + state.quietEnds.map(\.index) + state.cares.compactMap(\.spare?.index) + state.vacancies
  for index in indices + [state.coreIndex] { demand(state.processes.indices.contains(index), "process \(index)") }
  for index in state.vacancies { demand(state.processes[index].end != nil, "the place of a living process is free") }
  for process in state.processes { demand(process.processID > 0, "process \(process.processID)") }
  // What grows while a VM runs has room.
  let times = state.processes.map(\.startTime) + state.cares.flatMap(\.deaths) + state.pending.map(\.deadline)
  demand(times.allSatisfy { $0.nanoseconds < 1 << 62 }, "a time at the end of all times")
  let counters = state.recordings.map(\.count) + state.eventCounts.map(\.number) + state.cares.map(\.replayCount) + [state.nextEvent]
  demand(counters.allSatisfy { $0 < 1 << 62 }, "a count at the end of all numbers")
  let journal = EventJournal(state)
  demand(journal.forgottenCount < 1 << 62, "\(journal.forgottenCount) events forgotten")
  for client in state.clients {
    demand(client.received.count <= ControlServer.lineLimit, "a line of \(client.received.count) bytes")
    demand(client.outgoing.count <= SupervisorState.Client.longestRest, "\(client.outgoing.count) bytes for a client")
  }
  // The filter in force as somebody else's state tells it: that of this program is wider, or none of its calls is missing.
  do throws(StateError) { _ = try state.check() } catch { demand(!error.message.isEmpty, "an error without words") }
  follow(state.arguments, state.changes)
}

/// A configuration that was followed to is followed to again from its own changes, or the next upgrade is refused.
private func follow(_ arguments: [String], _ changes: [DeviceChange]) {
  guard let begin = try? VMConfiguration(arguments: arguments) else { return }
  var there = begin
  do throws(ConfigurationError) { try there.follow(changes) } catch { return demand(!error.message.isEmpty, "an error without words") }
  let ids = there.deviceIDs
  demand(Set(ids).count == ids.count, "an id is there twice: \(ids)")
  demand(ids.count <= VMConfiguration.Limits.devices + 1, "\(ids.count) devices")
  var again = begin
  do throws(ConfigurationError) { try again.follow(there.changes) } catch {
    return demand(false, "changes that were made cannot be followed: \(error.message)")
  }
  demand(again == there, "changes lead elsewhere the second time: \(there.changes)")
}

// MARK: Orders

let orders = Target(
  name: "orders", about: "lines of martlet ctl that name files and programs, as the spawner reads them",
  seeds: {
    [
      "add disk path=/a,id=x,readonly=on", "add net tap=t0,mac=52:54:00:12:34:56", "add generic socket=/p,device_type=rng,queue_sizes=[64]",
      "add console pty,id=c", "add rng on", "add fs tag=home,socket=/s", "add disk vhost_user=on,socket=/s,id=y",
      ReplaceOrder(id: "blk0", source: .same, disk: "path=\"/a,b\",direct=on", isDryRun: true, drain: 7).line,
      ReplaceOrder(id: "blk0", source: .program(["/bin/x", "a b%", ""])).line,
      ReplaceOrder(id: "net0", source: .jailed(["/bin/x", "{fd}"], profile: "/j")).line,
      ReplaceOrder(id: "blk0", source: .socket("/run/s"), drain: 1).line,
    ].map { [0] + Array($0.utf8) }
  },
  words: [
    "add ", "replace ", "blk0", "net0", "disk", "program ", "jail ", "socket ", "dry-run", "drain ", "%20", "%", "path=", "id=", "socket=",
    "vhost_user=on", "program=", "serial=", "readonly=on", "num_queues=", "cpu-limit=50%",
  ],
  run: { script in
    let choice = Int(script.byte() & 1)
    let bytes = script.rest()
    guard bytes.count <= Spawner.orderLimit, let line = String(validating: bytes, as: UTF8.self) else { return }
    let words = line.split(separator: " ", maxSplits: 1).map(String.init)
    guard words.count == 2 else { return }
    if words[0] == ReplaceOrder.verb { return replace(line, choice) }
    guard words[0] == DeviceOrder.verb else { return }
    do throws(ConfigurationError) {
      let order = try DeviceOrder(words: words[1])
      let rest = order.line.dropFirst(DeviceOrder.verb.utf8.count + 1)
      demand((try? DeviceOrder(words: String(rest))) == order, "an order changes on its way: \(order.line)")
      let (after, id) = try bases[choice].adding(order)
      demand(VMConfiguration.isName(id), "a device named '\(id)'")
      demand(after.deviceIDs.filter { $0 == id }.count == 1 && !bases[choice].deviceIDs.contains(id), "id \(id)")
      follow(baseArguments[choice], after.changes)
      var back = after.removing(id)
      demand(back.deviceIDs == bases[choice].deviceIDs, "what was added cannot be removed")
      back.changes = bases[choice].changes
      demand(back == bases[choice], "a device that was removed leaves something behind")
    } catch { demand(!error.message.isEmpty, "an error without words") }
  })

private func replace(_ line: String, _ choice: Int) {
  do throws(ConfigurationError) {
    let order = try ReplaceOrder(line: line)
    demand((try? ReplaceOrder(line: order.line)) == order, "an order changes on its way: \(order.line)")
    demand(VMConfiguration.isName(order.id), "a device named '\(order.id)'")
    switch order.source {
    case .same: break
    case .program(let program): demand(!program.isEmpty, "a program without a name")
    case .jailed(let program, let profile): demand(!program.isEmpty && profile.hasPrefix("/"), "a jail from '\(profile)'")
    case .socket(let path): demand((1...107).contains(path.utf8.count), "a socket '\(path)'")
    }
    guard let keys = order.disk, let disk = bases[choice].disks.first(where: { $0.id == order.id }) else { return }
    let new = try disk.with(keys: keys, cpuCount: bases[choice].cpuCount)
    demand(new.id == disk.id && new.queueCount == disk.queueCount && new.queueSize == disk.queueSize, "the guest sees another disk")
    var after = bases[choice]
    after.serve(new)
    follow(baseArguments[choice], after.changes)
  } catch { demand(!error.message.isEmpty, "an error without words") }
}

private let baseArguments = [
  ["--kernel", "k"],
  ["--kernel=k", "--disk", "path=/i,id=blk0,readonly=on,serial=s", "--net", "tap=t0", "--rng", "on", "--cpus", "boot=2"],
]
private let bases = baseArguments.map { arguments in sure("a command line") { try VMConfiguration(arguments: arguments) } }

// MARK: Seeds

private func assignment(_ id: String) -> DeviceAssignment {
  DeviceAssignment(id: id, deviceType: .block, pciSlot: 1, queueSizes: [256], configuration: [1, 2])
}

private let someRules = [
  SystemCallRule(number: 0, conditions: [], reason: "in force"),
  SystemCallRule(number: 9, conditions: [.init(argument: 2, test: .masked(4, equals: 0))], reason: "in force"),
  SystemCallRule(number: 16, conditions: [.init(argument: 1, test: .anyOf([1, 2]))], reason: "in force", failure: 1),
  SystemCallRule(number: 234, conditions: [.init(argument: 0, test: .ownProcess)], reason: "in force"),
]

private let someChanges = [
  DeviceChange(id: "x", step: .added(DeviceOrder(.disk, "path=/a,id=x"))),
  DeviceChange(id: "net0", step: .removed),
  DeviceChange(id: "x", step: .served(.socket("/s"))),
  DeviceChange(id: "blk0", step: .served(.program(.init(words: ["p", "{fd}"], profile: "/j", path: "/i")))),
  DeviceChange(id: "blk0", step: .image(.init(path: "/i", readOnly: true, isShared: false, serial: "s", arguments: ["--blk-file=/i"]))),
]

private func smallState() -> SupervisorState {
  var state = SupervisorState()
  state.arguments = baseArguments[0]
  state.mode = .log
  state.signals = 3
  state.channel = 4
  let now = MonotonicTime(nanoseconds: 1)
  state.processes = [
    .init(
      id: "core", program: "martlet-core", processID: 7, pidfd: 5, identity: nil, isOnTerminal: false, jailPlaces: nil, end: nil,
      startTime: now, readyTime: nil)
  ]
  return state
}

private func fullState() -> SupervisorState {
  var state = smallState()
  let now = MonotonicTime(nanoseconds: 1 << 40)
  let identity = ChildIdentity(uid: 100_001, gid: 100_001)
  state.arguments = baseArguments[1]
  state.changes = someChanges
  state.extraArguments = ["blk0": ["--direct"]]
  state.rules = someRules
  state.mode = .on
  state.identityBase = 100_000
  state.identitiesUsed = 3
  state.identitiesReleased = [identity]
  state.groups = .init(parent: "/g", name: "martlet-vm-7", controllers: [.cpu, .pids], ownName: "martlet-supervisor-vm-7")
  state.groupsLack = "why"
  state.log = 6
  state.guardian = .init(processID: 8, pidfd: 7, pipe: 8)
  state.madeNonBlocking = [0, 1]
  state.processes += [
    .init(
      id: "blk0", program: "martlet-block", processID: 9, pidfd: 9, identity: identity, isOnTerminal: true, jailPlaces: ["/p"],
      end: .killed(signal: 9), startTime: now, readyTime: now),
    .init(
      id: "x", program: "q", processID: 10, pidfd: 10, identity: nil, isOnTerminal: false, jailPlaces: nil, end: .exited(code: 1),
      startTime: now, readyTime: nil),
  ]
  state.vacancies = [2]
  state.assignments = [assignment("blk0")]
  state.reports = [
    DeviceReport(
      id: "blk0", state: .active, features: [.version1], protocolFeatures: 8, queues: [.init(size: 256, isEnabled: true)], reason: "")
  ]
  state.cares = [
    .init(
      id: "blk0", kind: .program("martlet-block", arguments: ["--blk-file=/i"], isOnTerminal: false),
      image: .init(path: "/i", readOnly: true, isShared: false), resources: [11], step: .due(now), restartCount: 1, deaths: [now],
      failureCount: 1, servedTime: now, shortServices: 2, replayCount: 3, lostTime: now, spare: .init(index: 1, socket: 12, image: 13),
      spareDue: now, spareFailures: 1),
    .init(
      id: "x", kind: .external(path: "/s"), image: nil, resources: [], step: .reattaching(sequence: 9), restartCount: 0, deaths: [],
      failureCount: 0, servedTime: nil, shortServices: 0, replayCount: 0, lostTime: nil, spare: nil, spareDue: nil),
    .init(
      id: "y", kind: .jailed, image: nil, resources: [], step: .held, restartCount: 0, deaths: [], failureCount: 0, servedTime: nil,
      shortServices: 0, replayCount: 0, lostTime: nil, spare: nil, spareDue: nil),
  ]
  state.claims = [.init(disk: "blk0", file: 14)]
  state.conversations = [.init(id: "blk0", text: "f 1")]
  state.recordings = [.init(id: "blk0", count: 2)]
  state.statistics = [.init(id: "blk0", queueCount: 1, file: 15)]
  state.escapeLines = [.init(index: 0, line: 16)]
  state.quietEnds = [.init(index: 1, time: now)]
  state.listener = 17
  state.nextClient = 2
  state.clients = [.init(id: 1, socket: 18, received: [105], outgoing: [123], followsEvents: true, missedCount: 1)]
  state.pending = [.init(sequence: 4, client: 1, verb: .info, deadline: now, device: "blk0")]
  state.events = [SupervisionEvent(number: 1, time: 5, kind: .lost, device: "blk0", text: "t", values: [.init("gap_ns", 3)])]
  state.eventCounts = [.init(device: "blk0", kind: .lost, number: 1)]
  state.nextEvent = 2
  state.asker = 1
  state.upgradeCount = 1
  return state
}

private func spawnerState(isFull: Bool) -> SpawnerState {
  var state = SpawnerState()
  state.arguments = baseArguments[isFull ? 1 : 0]
  // A termios.
  state.settings = [UInt8](repeating: 0, count: 60)
  state.directory = "/usr/lib/martlet"
  guard isFull else { return state }
  let identity = ChildIdentity(uid: 100_001, gid: 100_001)
  state.changes = someChanges
  state.extraArguments = ["blk0": ["--direct"]]
  state.rules = someRules
  state.cookie = 77
  state.identityBase = 100_000
  state.identitiesUsed = 3
  var launch = ChildLaunch(arguments: ["martlet-block", "--fd=3"], descriptors: [], identity: identity, threadLimit: 80)
  launch.fileLimit = 64
  state.launches = [.init(id: "blk0", program: "martlet-block", launch: launch)]
  state.jailed = [.init(id: "y", identity: identity, processID: 12)]
  state.assignments = [assignment("blk0")]
  let numbers = SpawnerState.FileNumbers(FileStatus(device: 1, inode: 2))
  state.own = [
    .init(
      id: "blk0", program: "martlet-block", arguments: ["--blk-file=/i"], isOnTerminal: false, resourceCount: 1,
      image: .init(readOnly: true, isShared: false, file: .init(path: "/i", numbers: numbers)))
  ]
  state.claims = [.init(disk: "blk0", isHeld: true, file: numbers), .init(disk: "x", isHeld: false, file: nil)]
  state.externals = [.init(id: "x", path: "/s")]
  state.hasGuardian = true
  state.isOnTerminal = true
  state.files = [.init(path: "/run/c", numbers: numbers)]
  state.added = [.init(id: "x", file: .init(path: "/run/d", numbers: numbers))]
  state.groups = .init(parent: "/g", name: "martlet-vm-7", controllers: [.memory, .io], ownName: nil)
  state.storage = [.init(id: "blk0", major: 8, minor: 1)]
  return state
}
