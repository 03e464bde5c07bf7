import BackendKit
import ControlProtocol
import Glibc
import Sandbox
import Supervision

// What people write: command lines, JSON, control messages, profiles, lists of system calls.

let commandLines = Target(
  name: "command-line", about: "the options of run and of the device programs",
  seeds: {
    [
      "--kernel\nk\n--disk\npath=a,id=x,readonly=on\npath=\"b,c\"\n--net\ntap=t0,mac=52:54:00:12:34:56\n--cpus\nboot=4",
      "--kernel=k\n--memory=size=1G\n--fs\ntag=home,socket=/s\n--generic-vhost-user\nsocket=/p,device_type=rng,queue_sizes=[64,1-3]",
      "--kernel=k\n--disk\nvhost_user=on,path=i,jail=j,program=\"q --fd {fd}\"\n--rng\non\n--console\npty\n--serial=file=/x",
      "!--socket-path=/s\n--blk-file=a\n--num-queues=4", "!--fd=3\n--ready-fd\n4\n--sandbox=on\n--title=x\n--log=debug",
    ].map { Array($0.utf8) }
  },
  words: [
    "--kernel", "--disk", "--net", "--memory", "--cpus", "--fs", "--rng", "--console", "--serial", "--generic-vhost-user", "size=", "path=",
    "id=", "vhost_user=on", "socket=", "[1-2]", "\"", "boot=", "tap=", "mac=", "on_death=", "--sandbox", "--control", "--name",
  ], run: parseCommandLine)

private func parseCommandLine(_ script: inout Script) {
  let bytes = script.rest()
  let isDevice = bytes.first == UInt8(ascii: "!")
  let words = bytes.dropFirst(isDevice ? 1 : 0).split(separator: 10, omittingEmptySubsequences: false).prefix(64)
  let arguments = words.map { String(decoding: $0, as: UTF8.self) }
  if isDevice {
    let options: [LaunchOption] = [
      .value("blk-file", "PATH", "a file"), .value("num-queues", "COUNT", "a number"), .flag("direct", "a switch"),
    ]
    do throws(BackendError) {
      let launch = try LaunchArguments.parse(arguments, options: options, alternative: "direct")
      if let number = try launch.number("num-queues", in: 1...64) { demand((1...64).contains(number), "a number out of its range") }
      demand(launch.request != .serve || (launch.connection != nil) != launch.has("direct"), "no connection and none asked for")
      if case .descriptor(let number) = launch.connection { demand(number >= 0, "descriptor \(number)") }
    } catch { demand(!error.description.isEmpty, "an error without words") }
    return
  }
  do throws(ConfigurationError) {
    let vm = try VMConfiguration(arguments: arguments)
    demand((1...VMConfiguration.Limits.cpus).contains(Int(vm.cpuCount)), "\(vm.cpuCount) processors")
    demand(
      vm.memorySize >= VMConfiguration.Limits.smallestMemory && vm.memorySize <= VMConfiguration.Limits.largestMemory,
      "memory of \(vm.memorySize)")
    demand(vm.memorySize % 4096 == 0, "memory of \(vm.memorySize)")
    demand(vm.commandLine.utf8.count <= VMConfiguration.Limits.commandLine, "a long command line")
    let ids = vm.disks.map(\.id) + vm.nets.map(\.id)
    demand(Set(ids).count == ids.count, "an id is there twice: \(ids)")
    demand(ids.count <= VMConfiguration.Limits.devices, "\(ids.count) devices")
    for disk in vm.disks {
      demand((1...UInt16(VMConfiguration.Limits.queues)).contains(disk.queueCount), "\(disk.queueCount) queues")
      demand(disk.queueSize > 0 && disk.queueSize & (disk.queueSize - 1) == 0, "queues of \(disk.queueSize)")
      demand((disk.serial?.utf8.count ?? 0) <= VMConfiguration.Limits.serial, "a long serial")
    }
    for net in vm.nets { demand((net.mac?.count ?? 6) == 6, "a MAC of another length") }
  } catch { demand(!error.message.isEmpty, "an error without words") }
}

// MARK: JSON

let jsonTexts = Target(
  name: "json", about: "the JSON reader and writer",
  seeds: {
    ["{\"a\":[1,-2,0.5e+1,true,false,null],\"t\":\"\\u00e4\\ud83d\\ude42\\n\"}", "[[[[]]]]", "18446744073709551616", " {} ", "\"a\\\\b\""]
      .map {
        Array($0.utf8)
      }
  }, words: ["true", "false", "null", "\\u", "\\ud83d", "1e9", "-0", "[[", "{\"", "\":"],
  run: { script in
    let bytes = script.rest()
    guard let value = try? JSONValue(parsing: bytes) else { return }
    let text = value.text
    demand(!text.contains("\n"), "a text of several lines")
    guard let again = try? JSONValue(parsing: text) else { return demand(false, "what we write we cannot read: \(text)") }
    demand(again == value, "a value changes on its way: \(text)")
    demand(again.text == text, "a text changes on its way: \(text)")
  })

// MARK: Between supervisor and core

let controlMessages = Target(
  name: "control-messages", about: "messages between supervisor and core, both directions",
  seeds: {
    let configuration = CoreConfiguration(
      name: "web1", cpuCount: 4, memorySize: 1 << 30, commandLine: "console=hvc0", hasInitramfs: true, hasSerial: true,
      restartsOnReset: false, replyDeadline: 5000)
    let toCore: [SupervisorMessage] = [
      .configure(configuration),
      .device(DeviceAssignment(id: "blk0", deviceType: .block, pciSlot: 1, queueSizes: [256, 128], configuration: [1, 2])),
      .stream(.serial), .start(deviceCount: 3), .pause, .information, .reattach(id: "blk0"), .giveUp(id: "net0"),
    ]
    let toSupervisor: [CoreMessage] = [
      .ready, .done, .refused("No."), .guest(.poweredOff), .failed(.device, "Gone."),
      .information(VMInformation(state: .paused, resetCount: 3, uptime: 9, counters: [.init(name: "exits", value: 7)])),
      .device(
        DeviceReport(
          id: "blk0", state: .active, features: [.version1], protocolFeatures: 8, queues: [.init(size: 256, isEnabled: true)], reason: "why"
        )),
    ]
    return toCore.map { [UInt8($0.descriptorCount)] + $0.encode(sequence: 7) } + toSupervisor.map { [0] + $0.encode(sequence: 7) }
  },
  run: { script in
    let count = Int(script.byte() & 15)
    let packet = script.rest()
    if let (message, sequence) = try? SupervisorMessage.decode(packet, descriptorCount: count) {
      demand(message.descriptorCount == count, "a message with \(count) descriptors too many or too few")
      demand(message.encode(sequence: sequence) == packet, "a message changes on its way")
    }
    if let (message, sequence) = try? CoreMessage.decode(packet, descriptorCount: count) {
      demand(message.encode(sequence: sequence) == packet, "an answer changes on its way")
    }
  })

// MARK: Profiles and lists

let jailProfiles = Target(
  name: "jail-profile", about: "profiles of jails, their paths and what is filled in",
  seeds: {
    [
      "program /usr/bin/x\nuser own\nnetwork no\nproc yes\nfile /etc/passwd ro optional\ndirectory {path} rw\ndevice /dev/null rw\n",
      "temporary /tmp 64M\ndescriptor 3\nenvironment A=b\nenvironment \"C D\"\ncapability CAP_CHOWN # owner\nlimit memory 512M\n",
      "call read # why\ncall mmap arg2 & 0x4 == 0 # never executable\ncall fcntl arg1 in 1, 3 # flags\nrefuse clone3 ENOSYS\nuser 1:2\nworking-directory /\n",
    ].map { Array($0.utf8) }
  },
  words: [
    "program", "user", "network", "proc", "file", "directory", "device", "temporary", "descriptor", "environment", "capability",
    "CAP_SYS_ADMIN",
    "limit", "call", "refuse", "ENOSYS", "optional", "arg0 & 1 == 1", " and ", "{path}", "..", "\"",
  ],
  run: { script in
    let text = String(decoding: script.rest(), as: UTF8.self)
    do throws(JailError) {
      let profile = try JailProfile(text, file: "profile")
      demand(profile.descriptors.allSatisfy { (3...31).contains($0) }, "descriptors \(profile.descriptors)")
      demand(profile.capabilities.allSatisfy { (0..<Capabilities.names.count).contains($0) }, "capabilities \(profile.capabilities)")
      for place in profile.places {
        demand(place.path.hasPrefix("/") || place.path.hasPrefix("{"), "path \(place.path)")
        var missing: String?
        let path = JailProfile.expand(place.path, ["path": "/a/./b", "name": "..", "id": ""], missing: &missing)
        if let normal = JailProfile.normal(path) {
          demand(JailProfile.normal(normal) == normal, "a normal path is not normal: \(normal)")
          demand(normal.hasPrefix("/") && !normal.split(separator: "/").contains(".."), "a path leads up: \(normal)")
        }
      }
      for (limit, value) in profile.limits { demand(value >= limit.least && value <= UInt64(Int64.max), "limit \(limit) \(value)") }
      checkFilter(profile.calls, profile.refused, Dice(state: UInt64(text.utf8.count) + 1))
    } catch { demand(!"\(error)".isEmpty, "an error without words") }
  })

let systemCallRules = Target(
  name: "system-call-rules", about: "lists of system calls, and the filter made of them, by an interpreter of the kernel's",
  seeds: {
    [
      "read # a\nwrite # b\nmmap arg2 & 0x4 == 0 # c\nfcntl arg1 in 1, 3, 1034 # d\ntgkill arg0 == self # e\n",
      "ioctl arg1 == 0x400454d0 and arg0 in 1, 2 and arg3 & 0xFFFFFFFF00000000 == 0 # f\nioctl arg1 == 3 # g\n", "# only\n\n  openat # h\n",
    ].map { Array($0.utf8) }
  }, words: ["arg0", "arg5", "==", " and ", " in ", "self", " & ", "0x", "# r", "read", "ioctl"],
  run: { script in
    let bytes = script.rest()
    let text = String(decoding: bytes, as: UTF8.self)
    guard let rules = try? SystemCallRule.parse(text) else { return }
    checkFilter(rules, [], Dice(state: UInt64(bytes.count) + 1))
  })

/// The program does in the kernel what the rules say.
private func checkFilter(_ rules: [SystemCallRule], _ refused: [(number: UInt32, errno: UInt16)], _ dice: Dice) {
  var dice = dice
  let ownProcess: Int32 = 4711
  let filter = SystemCallFilter(rules, processID: ownProcess, refused: refused)
  let numbers = rules.map(\.number) + [0, 500, 0x4000_0001] + refused.map(\.number)
  for _ in 0..<24 {
    let number = numbers[Int(dice.next() % UInt64(numbers.count))]
    var arguments = (0..<6).map { _ in dice.next() & 1 == 0 ? dice.next() & 7 : dice.next() }
    // As one of its rules wants it, mostly.
    let own = rules.filter { $0.number == number }
    if let rule = own.isEmpty ? nil : own[Int(dice.next() % UInt64(own.count))], dice.next() & 3 != 0 {
      for condition in rule.conditions {
        switch condition.test {
        case .masked(let mask, let value): arguments[condition.argument] = arguments[condition.argument] & ~mask | value
        case .anyOf(let values): arguments[condition.argument] = values[Int(dice.next() % UInt64(values.count))]
        case .ownProcess: arguments[condition.argument] = UInt64(ownProcess)
        }
      }
    }
    let isAllowed =
      number < 0x4000_0000
      && own.contains { rule in
        rule.failure == nil
          && rule.conditions.allSatisfy { condition in
            let argument = arguments[condition.argument]
            switch condition.test {
            case .masked(let mask, let value): return argument & mask == value
            case .anyOf(let values): return values.contains(argument)
            case .ownProcess: return UInt32(truncatingIfNeeded: argument) == UInt32(ownProcess)
            }
          }
      }
    let verdict = interpret(filter.instructions, number, arguments)
    demand(
      (verdict == 0x7FFF_0000) == isAllowed, "call \(number) with \(arguments) is \(isAllowed ? "refused" : "allowed") against the rules")
  }
}

/// The kernel's reading of a filter, as far as ours go.
func interpret(_ program: [SystemCallFilter.Instruction], _ number: UInt32, _ arguments: [UInt64]) -> UInt32 {
  func word(_ offset: UInt32) -> UInt32 {
    switch offset {
    case 0: return number
    case 4: return 0xC000_003E
    case 16..<64 where offset % 4 == 0: return UInt32(truncatingIfNeeded: arguments[Int(offset - 16) / 8] >> (offset % 8 == 0 ? 0 : 32))
    default:
      demand(false, "a filter loads from \(offset)")
      return 0
    }
  }
  var accumulator: UInt32 = 0
  var at = 0
  while true {
    guard program.indices.contains(at) else {
      demand(false, "a filter runs out of its program")
      return 0
    }
    let instruction = program[at]
    at += 1
    switch instruction.code {
    case 0x20: accumulator = word(instruction.value)
    case 0x54: accumulator &= instruction.value
    case 0x15: at += Int(accumulator == instruction.value ? instruction.jumpTrue : instruction.jumpFalse)
    case 0x35: at += Int(accumulator >= instruction.value ? instruction.jumpTrue : instruction.jumpFalse)
    case 0x05: at += Int(instruction.value)
    case 0x06: return instruction.value
    default: demand(false, "an instruction of no meaning")
    }
  }
}
