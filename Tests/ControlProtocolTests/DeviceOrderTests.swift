import ControlProtocol
import Testing

@Suite("Orders to add a device")
struct DeviceOrderTests {
  private func configuration() throws -> VMConfiguration {
    try VMConfiguration(arguments: ["--kernel", "k", "--disk", "path=a.img", "--rng", "on", "--console", "null"])
  }

  @Test func oneMoreDeviceGetsTheNextNumberAndAllChecks() throws {
    let before = try configuration()
    let (after, id) = try before.adding(DeviceOrder(words: "disk path=b.img,num_queues=2"))
    #expect(id == "blk1" && after.disks.count == 2 && after.disks[1].queueCount == 2)
    #expect(try after.adding(DeviceOrder(words: "console pty")).id == "con1")
    #expect(throws: ConfigurationError.self) { try after.adding(DeviceOrder(words: "disk path=c.img,id=blk1")) }
    #expect(throws: ConfigurationError.self) { try after.adding(DeviceOrder(words: "disk path=b.img")) }
    #expect(throws: ConfigurationError.self) { try after.adding(DeviceOrder(words: "rng on")) }
    #expect(throws: ConfigurationError.self) { try after.adding(DeviceOrder(words: "console tty")) }
    #expect(try after.removing("rng0").adding(DeviceOrder(words: "rng on")).id == "rng0")
    #expect(after.removing("blk1").deviceIDs == before.deviceIDs)
  }

  @Test(arguments: ["", "disk", "disk ", "dsik path=a", "memory size=1G"])
  func whatIsNoOrderIsRefused(_ line: String) { #expect(throws: ConfigurationError.self) { try DeviceOrder(words: line) } }

  @Test(arguments: [
    ("path=b.img,readonly=on", "path=/here/b.img,readonly=on"), ("path=/b.img", "path=/b.img"), ("on", "on"),
    (#"path="a,b",id=x"#, #"path="/here/a,b",id=x"#),
    ("socket=s,device_type=rng,queue_sizes=[64,64]", "socket=/here/s,device_type=rng,queue_sizes=[64,64]"),
    (#"program="p {fd}",jail=j,socket=/s"#, #"program=p {fd},jail=/here/j,socket=/s"#),
  ])
  func pathsAreMeantFromTheClient(_ value: String, _ expected: String) {
    #expect(DeviceOrder(.disk, value).absolute(from: "/here").value == expected)
  }

  @Test func changesLeadAnotherConfigurationToTheSamePlace() throws {
    var changed = try configuration()
    for words in ["disk path=b.img", "disk path=c.img,id=late", "console null"] {
      changed = try changed.adding(DeviceOrder(words: words)).configuration
    }
    changed = changed.removing("late").removing("blk0").removing("con0")
    #expect(changed.changes.count == 4, "\(changed.changes)")
    var other = try configuration()
    try other.follow(changed.changes)
    #expect(other.deviceIDs == changed.deviceIDs && other.disks == changed.disks && other.consoles == changed.consoles)
    // Coming and going leaves nothing.
    for _ in 0..<3 { other = try other.adding(DeviceOrder(words: "disk path=d.img,id=d")).configuration.removing("d") }
    #expect(other.changes.count == 4)
  }
}
